// The step of any rule on the GPU, for rows with streams in several dtypes, master weights, stochastic rounding, or of
// whose numbers something is to be told: the GPU's update_mixed() of step_kernel_cpu.h.
//
// dtypes are looked at while it runs, in branches that all lanes of a warp take together: as template parameters they
// would make dozens of kernels.
#pragma once
#include "optim/step_cuda.cuh"

namespace deepops::optim {

using core::BFloat16;
using core::DataType;

// How many elements a lane holds at a time, in type C: those of two packs in fp32, of one in 16 bits and in fp64.
template <class C>
constexpr int kHeld = sizeof(C) == 4 ? 8 : 2;

// ---- streams --------------------------------------------------------------------------------------------------------
//
// Two neighbouring lanes share 2 n elements, n = kHeld, from `base` on. The even lane holds the first pack's worth of
// the arithmetic's type, the odd one the second, the even one the third and the odd one the fourth, so that the wide
// accesses of a warp fill whole sectors of memory. In a stream of 16 bits a pack is twice as many elements: there the
// lanes exchange halves. With n = 1 `base` is the lane's one element. All lanes have to call; those that are not
// `there` access nothing and hold 0.

struct Place {
  int64_t base;  // in the tensor
  bool there;
};

DEEPOPS_DEVICE int odd() { return gpu::lane() & 1; }

// The place in the tensor of the j-th element that the lane holds.
template <class C, int n>
DEEPOPS_DEVICE int64_t place_of(const Place& at, int j) {
  constexpr int kPack = gpu::Pack<C>::kSize;
  return n == 1 ? at.base : at.base + (2 * (j / kPack) + odd()) * kPack + j % kPack;
}

// From what a pack of 16-bit elements has to what the lane holds, and back.
template <class T>
DEEPOPS_DEVICE gpu::Pack<T> exchanged(const gpu::Pack<T>& pack) {
  static_assert(sizeof(T) == 2);
  using Words = gpu::Pack<uint32_t>;
  Words w = __builtin_bit_cast(Words, pack);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const uint32_t other = gpu::shuffle_xor(odd() ? w.value[k] : w.value[2 + k], 1);
    (odd() ? w.value[k] : w.value[2 + k]) = other;
  }
  return __builtin_bit_cast(gpu::Pack<T>, w);
}

// T: of the stream, as it is stored.
template <class C, class T, int n>
DEEPOPS_DEVICE void load_raw(const void* stream, const Place& at, T (&out)[n], gpu::Here here = DEEPOPS_HERE) {
  using Pack = gpu::Pack<T>;
  const T* const p = static_cast<const T*>(stream) + at.base;
  if constexpr (n == 1) {
    out[0] = at.there ? gpu::load(p, here) : T{};
  } else {
    constexpr int kPacks = n / Pack::kSize;
#pragma unroll
    for (int q = 0; q < kPacks; ++q) {
      Pack pack = {};
      if (at.there) pack = gpu::load_pack(p + (2 * q + odd()) * Pack::kSize, here);
      if constexpr (sizeof(T) < sizeof(C)) pack = exchanged(pack);
#pragma unroll
      for (int j = 0; j < Pack::kSize; ++j) out[q * Pack::kSize + j] = pack.value[j];
    }
  }
}

template <class C, class T, int n>
DEEPOPS_DEVICE void store_raw(void* stream, const Place& at, const T (&in)[n], gpu::Here here = DEEPOPS_HERE) {
  using Pack = gpu::Pack<T>;
  T* const p = static_cast<T*>(stream) + at.base;
  if constexpr (n == 1) {
    if (at.there) gpu::store(p, in[0], here);
  } else {
    constexpr int kPacks = n / Pack::kSize;
#pragma unroll
    for (int q = 0; q < kPacks; ++q) {
      Pack pack;
#pragma unroll
      for (int j = 0; j < Pack::kSize; ++j) pack.value[j] = in[q * Pack::kSize + j];
      if constexpr (sizeof(T) < sizeof(C)) pack = exchanged(pack);
      gpu::store_pack_if(at.there, p + (2 * q + odd()) * Pack::kSize, pack, here);
    }
  }
}

template <class T, class C, int n>
DEEPOPS_DEVICE void load_widened(const void* stream, const Place& at, C (&out)[n]) {
  T raw[n];
  load_raw<C>(stream, at, raw);
#pragma unroll
  for (int j = 0; j < n; ++j) out[j] = gpu::widen(raw[j]);
}

template <class T, class C, int n>
DEEPOPS_DEVICE void store_narrowed(void* stream, const Place& at, const C (&in)[n]) {
  T raw[n];
#pragma unroll
  for (int j = 0; j < n; ++j) raw[j] = gpu::narrow<T>(in[j]);
  store_raw<C>(stream, at, raw);
}

// call.operator()<T>() for the type of a stream whose numbers are computed with in C.
template <class C, class Call>
DEEPOPS_DEVICE void with_type(DataType dtype, const Call& call) {
  if constexpr (__is_same(C, double)) {
    call.template operator()<double>();
  } else if (dtype == DataType::f16) {
    call.template operator()<core::Half>();
  } else if (dtype == DataType::bf16) {
    call.template operator()<BFloat16>();
  } else {
    call.template operator()<float>();
  }
}

template <class C, int n>
DEEPOPS_DEVICE void load_as(const void* stream, DataType dtype, const Place& at, C (&out)[n]) {
  with_type<C>(dtype, [&]<class T>() { load_widened<T>(stream, at, out); });
}

template <class C, int n>
DEEPOPS_DEVICE void store_as(void* stream, DataType dtype, const Place& at, const C (&in)[n]) {
  with_type<C>(dtype, [&]<class T>() { store_narrowed<T>(stream, at, in); });
}

// ---- parameters and states ------------------------------------------------------------------------------------------

// One row in one step.
struct MixedRow : Row {
  bool update = false;  // false: only facts, nothing is written
  bool write_grads = false, stochastic = false, facts = false;
  double grad_factor = 1;
  isa_gpu::Noise noise = {};
};

DEEPOPS_DEVICE uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

// source: of random numbers, 0 for the parameter, 1 ... for its states.
template <int n>
DEEPOPS_DEVICE void store_stochastically(const MixedRow& row, void* stream, uint32_t source, const Place& at,
                                         const float (&in)[n]) {
  BFloat16 raw[n];
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const auto index = uint64_t(place_of<float, n>(at, j));
    const uint32_t random = row.noise.bits(uint32_t(index), uint32_t(index >> 32), source);
    raw[j].bits = uint16_t(isa_gpu::stochastic_bfloat16_bits(bits_of(in[j]), random));
  }
  store_raw<float>(stream, at, raw);
}

template <int n>
DEEPOPS_DEVICE void load_halves(const MixedRow& row, const Place& at, float (&out)[n]) {
  uint16_t high[n], low[n];
  load_raw<float>(row.param, at, high);
  load_raw<float>(row.master, at, low);
#pragma unroll
  for (int j = 0; j < n; ++j) {
    out[j] = __builtin_bit_cast(float, isa_gpu::join(uint32_t(high[j]), uint32_t(low[j])));
  }
}

template <int n>
DEEPOPS_DEVICE void store_halves(const MixedRow& row, const Place& at, const float (&in)[n]) {
  uint16_t high[n], low[n];
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const isa_gpu::Halves<uint32_t> halves = isa_gpu::split(bits_of(in[j]));
    high[j] = uint16_t(halves.high);
    low[j] = uint16_t(halves.low);
  }
  store_raw<float>(row.param, at, high);
  store_raw<float>(row.master, at, low);
}

template <class C, int n>
DEEPOPS_DEVICE void store_rounded(const MixedRow& row, void* stream, DataType dtype, uint32_t source, const Place& at,
                                  const C (&in)[n]) {
  if constexpr (__is_same(C, float)) {
    if (row.stochastic && dtype == DataType::bf16) return store_stochastically(row, stream, source, at, in);
  }
  store_as(stream, dtype, at, in);
}

template <class C, int n>
DEEPOPS_DEVICE void load_param(const MixedRow& row, const Place& at, C (&out)[n]) {
  if constexpr (__is_same(C, float)) {
    if (row.master_kind == Master::full) return load_as(row.master, DataType::f32, at, out);
    if (row.master_kind == Master::low_half) return load_halves(row, at, out);
  }
  load_as(row.param, row.dtype, at, out);
}

template <class C, int n>
DEEPOPS_DEVICE void store_param(const MixedRow& row, const Place& at, const C (&in)[n]) {
  if constexpr (__is_same(C, float)) {
    if (row.master_kind == Master::low_half) return store_halves(row, at, in);
    if (row.master_kind == Master::full) {
      store_as(row.master, DataType::f32, at, in);
      return store_as(row.param, row.dtype, at, in);
    }
  }
  store_rounded(row, row.param, row.dtype, 0, at, in);
}

// What store_param() makes of a number: facts are about that. To store it once more changes nothing.
DEEPOPS_DEVICE float as_stored(const MixedRow& row, const Place& at, float value) {
  if (row.master_kind == Master::full) return value;
  const uint32_t bits = bits_of(value);
  if (row.master_kind == Master::low_half) {
    const isa_gpu::Halves<uint32_t> halves = isa_gpu::split(bits);
    return __builtin_bit_cast(float, isa_gpu::join(halves.high, halves.low));
  }
  if (row.stochastic && row.dtype == DataType::bf16) {
    const auto index = uint64_t(place_of<float, 1>(at, 0));
    const uint32_t random = row.noise.bits(uint32_t(index), uint32_t(index >> 32), 0);
    return __builtin_bit_cast(float, isa_gpu::stochastic_bfloat16_bits(bits, random) << 16);
  }
  with_type<float>(row.dtype, [&]<class T>() { value = gpu::widen(gpu::narrow<T>(value)); });
  return value;
}

// ---- the update -----------------------------------------------------------------------------------------------------

template <class Rule, int kStates, class C, int n>
DEEPOPS_DEVICE void update_mixed(const MixedRow& row, const Place& at, const Factors<Rule, C>& f, RowFacts& facts) {
  C grad[n], param[n], state[Row::kStates][n];
  load_as(row.grad, row.dtype, at, grad);
  const bool tells = n == 1 && row.facts;
  if (tells) {
    facts.grad_squares += double(grad[0]) * double(grad[0]);
    facts.non_finite += grad[0] - grad[0] == 0 ? 0 : 1;
    if (!row.update) return;
  }
  load_param(row, at, param);
#pragma unroll
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) load_as(row.state[k], row.state_dtype, at, state[k]);
  }
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const C old = param[j];
    C s[Row::kStates] = {};
#pragma unroll
    for (int k = 0; k < Row::kStates; ++k) {
      if (kStates >> k & 1) s[k] = state[k][j];
    }
    Math<Rule>::template element<kStates>(param[j], grad[j], s, f);
#pragma unroll
    for (int k = 0; k < Row::kStates; ++k) {
      if (kStates >> k & 1) state[k][j] = s[k];
    }
    if (tells) {
      if constexpr (__is_same(C, float)) param[j] = as_stored(row, at, param[j]);
      const double change = double(param[j]) - double(old);
      facts.param_squares += double(param[j]) * double(param[j]);
      facts.update_squares += change * change;
    }
  }
  store_param(row, at, param);
#pragma unroll
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) store_rounded(row, row.state[k], row.state_dtype, 1 + k, at, state[k]);
  }
  if (row.write_grads) {
    const C factor = C(row.grad_factor);
#pragma unroll
    for (int j = 0; j < n; ++j) grad[j] = grad[j] * factor;
    store_as(row.grad, row.dtype, at, grad);
  }
}

template <class Rule, int kStates, class C>
DEEPOPS_DEVICE void update_mixed(const MixedRow& row, int64_t begin, int64_t end, const typename Rule::Scalars& scalars,
                                 RowFacts& facts) {
  constexpr int kShared = 2 * kHeld<C>;  // by two lanes
  const auto f = Math<Rule>::template rounded<C>(scalars);
  // Facts are taken one by one: with several at once the registers would not suffice.
  const int gap = row.facts ? -1 : gap_of_all(row, kStates);
  const Span span = span_of(gap, row.numel, begin, end, kShared);
#pragma unroll 1
  for (int first = 0; first < span.packed; first += gpu::kWarp / 2 * kShared) {
    const int k = first + gpu::lane() / 2 * kShared;
    update_mixed<Rule, kStates, C, kHeld<C>>(row, {span.begin + span.head + k, k < span.packed}, f, facts);
  }
#pragma unroll 1
  for (int k = gpu::lane(); k < span.count - span.packed; k += gpu::kWarp) {
    update_mixed<Rule, kStates, C, 1>(row, {span.single(k), true}, f, facts);
  }
}

// ---- facts ----------------------------------------------------------------------------------------------------------

// Sums over the lanes, stored by the first.
DEEPOPS_DEVICE void store_sum(RowFacts* to, const RowFacts& facts) {
  const double sum[] = {gpu::warp_sum<gpu::kWarp>(facts.grad_squares), gpu::warp_sum<gpu::kWarp>(facts.non_finite),
                        gpu::warp_sum<gpu::kWarp>(facts.param_squares),
                        gpu::warp_sum<gpu::kWarp>(facts.update_squares)};
  if (gpu::lane() != 0) return;
  gpu::store(&to->grad_squares, sum[0]);
  gpu::store(&to->non_finite, sum[1]);
  gpu::store(&to->param_squares, sum[2]);
  gpu::store(&to->update_squares, sum[3]);
}

// What a warp has found in the stretch of row i that begins at `begin`; the last warp of the row adds up all of them,
// in an order that does not depend on who that is.
template <class Rule>
DEEPOPS_DEVICE void tell(const StepArguments<Rule>& a, int64_t i, int64_t begin, int64_t parts, const RowFacts& facts) {
  if (parts == 1) return store_sum(a.facts + i, facts);
  store_sum(a.slots + slot_of(a.table, i, begin), facts);
  unsigned last = 0;
  if (gpu::lane() == 0) last = comes_last(a.counted + i, parts);
  if (!gpu::shuffle(last, 0)) return;
  gpu::warp_barrier();
  const int64_t first = gpu::load(a.table.slots + i);
  RowFacts sum = {};
#pragma unroll 1
  for (int64_t k = gpu::lane(); k < parts; k += gpu::kWarp) {
    const RowFacts* const slot = a.slots + first + k;
    sum.grad_squares += gpu::load_fresh(&slot->grad_squares);
    sum.non_finite += gpu::load_fresh(&slot->non_finite);
    sum.param_squares += gpu::load_fresh(&slot->param_squares);
    sum.update_squares += gpu::load_fresh(&slot->update_squares);
  }
  store_sum(a.facts + i, sum);
}

template <class Rule>
DEEPOPS_KERNEL(kStepThreads, kMixedBlocks<Rule>)
mixed_step_kernel(StepArguments<Rule> a) {
  const isa_gpu::Scaled scaling = scaled(a.scaling);
  if (scaling.skips && !a.facts) return;
  visit_empty(a, true, scaling.skips);
  for_each_stretch_of_warp<kStepThreads>(a.table, [&](int64_t i, int64_t begin, int64_t end) {
    MixedRow row = {load_record(a.table.rows + i)};
    if (!is_mixed(row, a.all_mixed, a.rounding.stochastic)) return;
    const bool is_whole = begin == 0 && end == row.numel;
    const int64_t parts = is_whole ? 1 : parts_of(a.table, i, row.numel);
    const WarpGroup<Rule> group(a.groups + row.group);
    typename Rule::Scalars scalars = {};
    row.update = !scaling.skips;
    row.write_grads = a.scaling.write_grads;
    row.stochastic = a.rounding.stochastic;
    row.facts = a.facts != nullptr;
    row.grad_factor = scaling.grad_factor;
    if (row.update) {
      const float t = next_step(row.step, a.arrived + i, parts);
      scalars = group.scalars(t, scaling.grad_factor);
      row.noise = isa_gpu::Noise::of(a.rounding.seed, t, row.number);
    }
    RowFacts facts = {};
    with_states<Rule>(group.states(), [&]<int kStates>() {
      row.dtype == DataType::f64 ? update_mixed<Rule, kStates, double>(row, begin, end, scalars, facts)
                                 : update_mixed<Rule, kStates, float>(row, begin, end, scalars, facts);
    });
    if (a.facts) tell(a, i, begin, parts, facts);
  });
}

}  // namespace deepops::optim
