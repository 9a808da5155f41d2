// The step of any rule on the GPU, for rows all of whose streams have one dtype: one launch for all tensors of all
// param groups and dtypes. Include <rule>_math.h first.
//
// Nothing of a step is read by the host: warps make the scalars of each tensor from its step counter, and the factor of
// the gradients from what GradScaler and the norm have left in device memory, so that the host never waits and a CUDA
// graph of the step goes on counting. Elements are independent of each other: the bits do not depend on how they are
// divided.
#pragma once
#include "optim/rows.cuh"
//
#include "optim/rule.h"
#include "optim/rule_math.h"
#include "optim/scaling_math.h"
#include "optim/step.h"

namespace deepops::optim {

using isa_gpu::Math;

template <class Rule, class C>
using Factors = typename Math<Rule>::template Factors<C>;

constexpr int kStepThreads = 128;

// Blocks on a multiprocessor for which registers have to suffice without spilling any: of step_kernel, of
// mixed_step_kernel.
template <class Rule>
constexpr int kUniformBlocks = 5;
template <class Rule>
constexpr int kMixedBlocks = 4;

// What a kernel is given. Pointers: in device memory.
template <class Rule>
struct StepArguments {
  RowTable table;
  const typename Rule::Group* groups;  // by Row::group
  unsigned* arrived;                   // [count]: warps that have read the row's step counter; 0 between launches
  Scaling scaling;
  Rounding rounding;
  bool all_mixed;     // is_mixed()
  bool some_empty;    // there is something to do for rows without elements
  RowFacts* facts;    // [count]; null: not wanted
  RowFacts* slots;    // by slot, for facts
  unsigned* counted;  // [count]: warps that have filled a slot of the row; 0 between launches
};

DEEPOPS_DEVICE isa_gpu::Scaled scaled(const Scaling& scaling) {
  return isa_gpu::scaled(scaling, [](const auto* p) { return gpu::load(p); });
}

// A param group as a warp sees it. A rule whose scalars take long has a specialisation that shares them out; all lanes
// call scalars() together and get the same.
template <class Rule>
class WarpGroup {
 public:
  DEEPOPS_DEVICE explicit WarpGroup(const typename Rule::Group* group) : group_(load_record(group)) {}
  DEEPOPS_DEVICE int states() const { return Rule::states(group_.hyper); }
  DEEPOPS_DEVICE typename Rule::Scalars scalars(float t, double grad_factor) const {
    return Math<Rule>::scalars(group_, t, grad_factor);
  }

 private:
  typename Rule::Group group_;
};

// The step that is being taken. Many warps of many blocks may ask for the same tensor, one for each of its `parts`, and
// the last of them, when all have read the counter, advances it.
DEEPOPS_DEVICE float next_step(float* step, unsigned* arrived, int64_t parts) {
  float t = 0;
  if (gpu::lane() == 0) {
    t = gpu::load(step) + 1;
    if (comes_last(arrived, parts)) gpu::store(step, t);
  }
  return gpu::shuffle(t, 0);
}

// Rows without elements, which no work item has: their counters are advanced all the same, their facts are 0.
template <class Rule>
DEEPOPS_DEVICE void visit_empty(const StepArguments<Rule>& a, bool mixed, bool skips) {
  if (!a.some_empty || gpu::block() != 0) return;
  for (int64_t i = gpu::thread(); i < a.table.count; i += kStepThreads) {
    const Row row = load_record(a.table.rows + i);
    if (row.numel != 0 || is_mixed(row, a.all_mixed, a.rounding.stochastic) != mixed) continue;
    if (row.active && !skips) gpu::store(row.step, gpu::load(row.step) + 1);
    if (a.facts) {
      double* const facts = &a.facts[i].grad_squares;
#pragma unroll
      for (int k = 0; k < int(sizeof(RowFacts) / sizeof(double)); ++k) gpu::store(facts + k, 0.0);
    }
  }
}

// n elements from p on, in one access: 1, or as many as a pack has.
template <class T, int n>
struct Some {
  T value[n];
};

template <int n, class T>
DEEPOPS_DEVICE Some<T, n> load_some(const T* p, gpu::Here here = DEEPOPS_HERE) {
  using Result = Some<T, n>;
  if constexpr (n == 1) {
    return {{gpu::load(p, here)}};
  } else {
    return __builtin_bit_cast(Result, gpu::load_pack(p, here));
  }
}
template <int n, class T>
DEEPOPS_DEVICE void store_some(T* p, const Some<T, n>& some, gpu::Here here = DEEPOPS_HERE) {
  if constexpr (n == 1) {
    gpu::store(p, some.value[0], here);
  } else {
    gpu::store_pack(p, __builtin_bit_cast(gpu::Pack<T>, some), here);
  }
}

// ---- all streams in one dtype ---------------------------------------------------------------------------------------

// n elements from place i on.
template <class Rule, int kStates, int n, class T>
DEEPOPS_DEVICE void update_some(const Row& row, int64_t i, const Factors<Rule, core::OpMath<T>>& f) {
  using C = core::OpMath<T>;
  T* const at_param = static_cast<T*>(row.param) + i;
  Some<T, n> param = load_some<n>(at_param), state[Row::kStates] = {};
#pragma unroll
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) state[k] = load_some<n>(static_cast<const T*>(row.state[k]) + i);
  }
  const Some<T, n> grad = load_some<n>(static_cast<const T*>(row.grad) + i);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    C p = gpu::widen(param.value[j]), s[Row::kStates] = {};
#pragma unroll
    for (int k = 0; k < Row::kStates; ++k) {
      if (kStates >> k & 1) s[k] = gpu::widen(state[k].value[j]);
    }
    Math<Rule>::template element<kStates>(p, C(gpu::widen(grad.value[j])), s, f);
    param.value[j] = gpu::narrow<T>(p);
#pragma unroll
    for (int k = 0; k < Row::kStates; ++k) {
      if (kStates >> k & 1) state[k].value[j] = gpu::narrow<T>(s[k]);
    }
  }
  store_some(at_param, param);
#pragma unroll
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) store_some(static_cast<T*>(row.state[k]) + i, state[k]);
  }
}

template <class Rule, int kStates, class T>
DEEPOPS_DEVICE void update(const Row& row, int64_t begin, int64_t end, const typename Rule::Scalars& scalars) {
  constexpr int kPack = gpu::Pack<T>::kSize;
  const auto f = Math<Rule>::template rounded<core::OpMath<T>>(scalars);
  const Span span = span_of(gap_of_all(row, kStates), row.numel, begin, end, kPack);
#pragma unroll 1
  for (int k = gpu::lane() * kPack; k < span.packed; k += gpu::kWarp * kPack) {
    update_some<Rule, kStates, kPack, T>(row, span.begin + span.head + k, f);
  }
#pragma unroll 1
  for (int k = gpu::lane(); k < span.count - span.packed; k += gpu::kWarp) {
    update_some<Rule, kStates, 1, T>(row, span.single(k), f);
  }
}

template <class Rule>
DEEPOPS_KERNEL(kStepThreads, kUniformBlocks<Rule>)
step_kernel(StepArguments<Rule> a) {
  const isa_gpu::Scaled scaling = scaled(a.scaling);
  if (scaling.skips) return;
  visit_empty(a, false, false);
  for_each_stretch_of_warp<kStepThreads>(a.table, [&](int64_t i, int64_t begin, int64_t end) {
    const Row row = load_record(a.table.rows + i);
    if (is_mixed(row, a.all_mixed, a.rounding.stochastic)) return;
    const bool is_whole = begin == 0 && end == row.numel;
    const float t = next_step(row.step, a.arrived + i, is_whole ? 1 : parts_of(a.table, i, row.numel));
    const WarpGroup<Rule> group(a.groups + row.group);
    const typename Rule::Scalars scalars = group.scalars(t, scaling.grad_factor);
    with_states<Rule>(group.states(), [&]<int kStates>() {
      DEEPOPS_DISPATCH_DTYPE(row.dtype, [&]<class T>() { update<Rule, kStates, T>(row, begin, end, scalars); })
    });
  });
}

}  // namespace deepops::optim
