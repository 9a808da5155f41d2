// The step of any rule on the CPU: one parallel region over all tensors, around the kernels of step_kernel_cpu.h.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "core/parallel.h"
#include "optim/groups.h"
#include "optim/plan.h"
#include "optim/rule.h"
#include "optim/scaling_math.h"
#include "optim/step.h"

namespace deepops::optim {

// Items below which no further thread is woken: about 30 us of work.
inline constexpr int64_t kCpuGrain = 4;

struct CpuBackend {
  static constexpr const char* kDevice = "CPU";
  static bool on_device(const torch::stable::Tensor& tensor) { return tensor.is_cpu(); }
  static int64_t chunk(const std::vector<int64_t>&) { return kCpuChunk; }
};

// The sum of a row's slots, in their order.
template <class Part>
Part sum_of_row(const ChunkPlan& plan, const std::vector<Part>& slots, int64_t row) {
  Part sum = {};
  for (int64_t slot = plan.slots()[row]; slot < plan.slots()[row + 1]; ++slot) sum += slots[slot];
  return sum;
}

template <class Rule>
class CpuStep {
 public:
  static void run(const StepCall& call, const RuleKernels<Rule>& kernels) {
    if (!any_active(call)) return;
    const auto scaling = isa_generic::scaled(call.scaling, [](const auto* p) { return *p; });
    if (scaling.skips && !call.facts) return;
    Memory once;
    if (call.memory && !*call.memory) *call.memory = std::make_unique<Memory>();
    auto& memory = call.memory ? static_cast<Memory&>(**call.memory) : once;
    const std::vector<Group>& groups = memory.groups.update(call);
    const std::vector<Scalars> scalars =
        scaling.skips ? std::vector<Scalars>(call.row_count) : advance(call, groups, kernels, scaling.grad_factor);
    const ChunkPlan& plan = *call.plan;
    std::vector<RowFacts> facts(call.facts ? plan.slots().back() : 0);
    core::parallel_for(plan.items(), kCpuGrain, [&](int64_t first, int64_t last) {
      plan.for_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
        const Row& row = call.rows[i];
        const int states = Rule::states(groups[row.group].hyper);
        if (!is_mixed(call, row)) {
          kernels.update(chunk_of(row, states, begin, end), states, scalars[i]);
          return;
        }
        MixedChunk chunk{};
        static_cast<Chunk&>(chunk) = chunk_of(row, states, begin, end);
        chunk.state_dtype = row.state_dtype;
        chunk.master = at(row.master, size_of(row.master_kind), begin);
        chunk.master_kind = row.master_kind;
        chunk.update = !scaling.skips;
        chunk.write_grads = call.scaling.write_grads;
        chunk.grad_factor = scaling.grad_factor;
        chunk.stochastic = call.rounding.stochastic;
        chunk.seed = call.rounding.seed;
        chunk.step = *row.step;
        chunk.number = row.number;
        chunk.begin = begin;
        chunk.facts = call.facts ? &facts[plan.slot(i, begin)] : nullptr;
        kernels.update_mixed(chunk, states, scalars[i]);
      });
    });
    if (!call.facts) return;
    for (int64_t i = 0; i < call.row_count; ++i) call.facts[i] = sum_of_row(plan, facts, i);
  }

 private:
  using Group = typename Rule::Group;
  using Scalars = typename Rule::Scalars;

  struct Memory final : StepMemory {
    Groups<Rule> groups;
  };

  // Advances the step counters and returns the scalars of every row. Rows of one group at the same step share them: in
  // most models that is all of them.
  static std::vector<Scalars> advance(const StepCall& call, const std::vector<Group>& groups,
                                      const RuleKernels<Rule>& kernels, double grad_factor) {
    std::vector<Scalars> result(call.row_count);
    const Row* same = nullptr;
    for (int64_t i = 0; i < call.row_count; ++i) {
      const Row& row = call.rows[i];
      if (!row.active) continue;
      *row.step += 1;
      const bool known = same && same->group == row.group && *same->step == *row.step;
      result[i] = known ? result[same - call.rows] : kernels.scalars(groups[row.group], *row.step, grad_factor);
      same = &row;
    }
    return result;
  }

  static void* at(void* data, int64_t size, int64_t begin) {
    return data ? static_cast<char*>(data) + begin * size : nullptr;
  }

  static Chunk chunk_of(const Row& row, int states, int64_t begin, int64_t end) {
    const int64_t size = core::size_of(row.dtype), state_size = core::size_of(row.state_dtype);
    Chunk chunk = {at(row.param, size, begin), at(row.grad, size, begin), {}, end - begin, row.dtype};
    for (int k = 0; k < Row::kStates; ++k) {
      if (states >> k & 1) chunk.state[k] = at(row.state[k], state_size, begin);
    }
    return chunk;
  }
};

}  // namespace deepops::optim
