// The CPU kernels of any rule, on raw pointers: make_kernels<Rule>() for a <rule>_kernel_cpu.cpp, which is compiled
// once per instruction set (cmake/CpuIsa.cmake). Include <rule>_math.h first.
#pragma once
#include "core/lanes.h"
#include "optim/rule.h"
#include "optim/rule_math.h"
#include "optim/scaling_math.h"
#include "optim/squares_cpu.h"

namespace deepops::DEEPOPS_ISA {

template <class S>
Lanes<S> square_root(Lanes<S> x) {
  constexpr int kParts = Lanes<S>::kParts;
  DEEPOPS_FOR_PARTS(p) {
    for (int i = 0; i < Lanes<S>::kPerPart; ++i) x.part[p][i] = square_root(S(x.part[p][i]));
  }
  return x;
}

namespace {

using core::BFloat16;
using core::OpMath;
using optim::Chunk;
using optim::Master;
using optim::MixedChunk;
using optim::Row;

template <class Rule, class T>
using Factors = typename Math<Rule>::template Factors<OpMath<T>>;

// ---- all streams in one dtype ---------------------------------------------------------------------------------------

template <class T>
struct Streams {
  T *param, *grad, *state[Row::kStates];
};

// 16 elements.
template <class Rule, int kStates, class T>
[[gnu::always_inline]] inline void update_lanes(const Streams<T>& at, int64_t i, const Factors<Rule, T>& f) {
  using V = Lanes<OpMath<T>>;
  V p = load_lanes(at.param + i), s[Row::kStates];
#pragma GCC unroll 3
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) s[k] = load_lanes(at.state[k] + i);
  }
  Math<Rule>::template element<kStates>(p, V(load_lanes(at.grad + i)), s, f);
  store_lanes(at.param + i, p);
#pragma GCC unroll 3
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) store_lanes(at.state[k] + i, s[k]);
  }
}

// 32 bf16 elements: those at even places in one vector, those at odd places in another. Elements are independent, so
// their order does not matter, and a shift or a mask does what takes a shuffle in order.
struct EvenAndOdd {
  Lanes<float> even, odd;
};

[[gnu::always_inline]] inline EvenAndOdd load_pairs(const BFloat16* p) {
  constexpr int kParts = Lanes<float>::kParts;
  EvenAndOdd out;
  DEEPOPS_FOR_PARTS(k) {
    U32Part bits;
    __builtin_memcpy(&bits, p + k * 2 * Lanes<float>::kPerPart, sizeof bits);
    out.even.part[k] = (Lanes<float>::Value)(bits << 16);
    out.odd.part[k] = (Lanes<float>::Value)(bits & 0xffff0000u);
  }
  return out;
}

// Rounds to nearest even. NaN needs no care here: what is computed from bf16 numbers has no NaN but those it was given
// and the machine's own, whose lower halves are 0, so that rounding leaves them alone.
[[gnu::always_inline]] inline void store_pairs(BFloat16* p, const EvenAndOdd& value) {
  constexpr int kParts = Lanes<float>::kParts;
  const auto rounded = [](Lanes<float>::Value part) { return rounded_to_upper_half((U32Part)part); };
  DEEPOPS_FOR_PARTS(k) {
    const U32Part bits = (rounded(value.even.part[k]) >> 16) | (rounded(value.odd.part[k]) & 0xffff0000u);
    __builtin_memcpy(p + k * 2 * Lanes<float>::kPerPart, &bits, sizeof bits);
  }
}

template <class Rule, int kStates>
[[gnu::always_inline]] inline void update_pairs(const Streams<BFloat16>& at, int64_t i,
                                                const Factors<Rule, BFloat16>& f) {
  EvenAndOdd p = load_pairs(at.param + i);
  const EvenAndOdd g = load_pairs(at.grad + i);
  Lanes<float> even[Row::kStates], odd[Row::kStates];
#pragma GCC unroll 3
  for (int k = 0; k < Row::kStates; ++k) {
    if (!(kStates >> k & 1)) continue;
    const EvenAndOdd s = load_pairs(at.state[k] + i);
    even[k] = s.even;
    odd[k] = s.odd;
  }
  Math<Rule>::template element<kStates>(p.even, g.even, even, f);
  Math<Rule>::template element<kStates>(p.odd, g.odd, odd, f);
  store_pairs(at.param + i, p);
#pragma GCC unroll 3
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) store_pairs(at.state[k] + i, {even[k], odd[k]});
  }
}

template <class T>
inline constexpr int kAtOnce = __is_same(T, BFloat16) ? 2 * kLanes : kLanes;

template <class Rule, int kStates, class T>
[[gnu::always_inline]] inline void update_some(const Streams<T>& at, int64_t i, const Factors<Rule, T>& f) {
  if constexpr (__is_same(T, BFloat16)) {
    update_pairs<Rule, kStates>(at, i, f);
  } else {
    update_lanes<Rule, kStates>(at, i, f);
  }
}

template <class Rule, int kStates, class T>
void update(const Streams<T>& streams, int64_t n, const Factors<Rule, T>& factors) {
  const auto f = factors;  // copies no store below can alias, so they stay in registers
  const Streams<T> at = streams;
  int64_t i = 0;
  for (; i + kAtOnce<T> <= n; i += kAtOnce<T>) update_some<Rule, kStates>(at, i, f);
  if (i == n) return;
  // The last ones like the others: one by one, eight take as long as ten times sixteen.
  T tail[2 + Row::kStates][kAtOnce<T>] = {};
  const Streams<T> in_tail = {tail[0], tail[1], {tail[2], tail[3], tail[4]}};
  const size_t bytes = size_t(n - i) * sizeof(T);
  __builtin_memcpy(in_tail.param, at.param + i, bytes);
  __builtin_memcpy(in_tail.grad, at.grad + i, bytes);
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) __builtin_memcpy(in_tail.state[k], at.state[k] + i, bytes);
  }
  update_some<Rule, kStates>(in_tail, 0, f);
  __builtin_memcpy(at.param + i, in_tail.param, bytes);
  for (int k = 0; k < Row::kStates; ++k) {
    if (kStates >> k & 1) __builtin_memcpy(at.state[k] + i, in_tail.state[k], bytes);
  }
}

template <class Rule>
void update_chunk(const Chunk& c, int states, const typename Rule::Scalars& scalars) {
  DEEPOPS_DISPATCH_DTYPE(c.dtype, [&]<class T>() {
    const Streams<T> streams = {
        static_cast<T*>(c.param),
        static_cast<T*>(c.grad),
        {static_cast<T*>(c.state[0]), static_cast<T*>(c.state[1]), static_cast<T*>(c.state[2])}};
    const auto f = Math<Rule>::template rounded<OpMath<T>>(scalars);
    optim::with_states<Rule>(states, [&]<int kStates>() { update<Rule, kStates, T>(streams, c.n, f); });
  })
}

// ---- streams in several dtypes --------------------------------------------------------------------------------------
//
// Block by block: what is not in the type of the arithmetic is converted into a few KB that stay in the level-1 cache,
// the kernel above runs there, and what it changed is converted back. So no combination of dtypes needs code of its
// own.

constexpr int kBlock = 512;

// C: the type of the arithmetic. Elements between n and the next multiple of 16 become 0.
template <class C>
void widen_block(const void* data, core::DataType dtype, int64_t begin, int n, C* out) {
  DEEPOPS_DISPATCH_DTYPE(dtype, [&]<class T>() {
    if constexpr (__is_same(OpMath<T>, C)) {
      const T* in = static_cast<const T*>(data) + begin;
      int i = 0;
      for (; i + kLanes <= n; i += kLanes) store_lanes(out + i, Lanes<C>(load_lanes(in + i)));
      if (i == n) return;
      T tail[kLanes] = {};
      __builtin_memcpy(tail, in + i, size_t(n - i) * sizeof(T));
      store_lanes(out + i, Lanes<C>(load_lanes(tail)));
    }
  })
}

template <class C>
void narrow_block(const C* in, void* data, core::DataType dtype, int64_t begin, int n) {
  DEEPOPS_DISPATCH_DTYPE(dtype, [&]<class T>() {
    if constexpr (__is_same(OpMath<T>, C)) {
      T* out = static_cast<T*>(data) + begin;
      int i = 0;
      for (; i + kLanes <= n; i += kLanes) store_lanes(out + i, load_lanes(in + i));
      if (i == n) return;
      T tail[kLanes];
      store_lanes(tail, load_lanes(in + i));
      __builtin_memcpy(out + i, tail, size_t(n - i) * sizeof(T));
    }
  })
}

inline uint32_t bits_of(float value) { return __builtin_bit_cast(uint32_t, value); }

// place: of in[0] in the whole tensor.
inline void narrow_stochastically(const float* in, BFloat16* out, int64_t begin, int n, const Noise& noise,
                                  uint32_t stream, int64_t place) {
  out += begin;
  for (int i = 0; i < n; ++i) {
    const uint64_t index = uint64_t(place + i);
    const uint32_t random = noise.bits(uint32_t(index), uint32_t(index >> 32), stream);
    out[i].bits = uint16_t(stochastic_bfloat16_bits(bits_of(in[i]), random));
  }
}

inline void join_block(const BFloat16* high, const uint16_t* low, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = __builtin_bit_cast(float, join(uint32_t(high[i].bits), uint32_t(low[i])));
}

inline void split_block(const float* in, BFloat16* high, uint16_t* low, int n) {
  for (int i = 0; i < n; ++i) {
    const Halves<uint32_t> halves = split(bits_of(in[i]));
    high[i].bits = uint16_t(halves.high);
    low[i] = uint16_t(halves.low);
  }
}

// Of a - b. Both arrays are padded with equal elements to a multiple of 16. b: null: 0.
template <class C>
optim::GradSquares squares_of(const C* a, const C* b, int n) {
  SquaresInLanes squares;
  for (int i = 0; i < n; i += kLanes) {
    Lanes<double> difference = widen(load_lanes(a + i));
    if (b) difference = difference - widen(load_lanes(b + i));
    squares.add(difference);
  }
  return squares.sum();
}

// The tensors of a block in the type of the arithmetic.
template <class C>
struct alignas(64) Block {
  C grad[kBlock], param[kBlock], old_param[kBlock], state[Row::kStates][kBlock];
};

template <class C>
void load_param(const MixedChunk& c, int64_t i, int n, C* out) {
  if constexpr (__is_same(C, float)) {
    if (c.master_kind == Master::full) return widen_block(c.master, core::DataType::f32, i, n, out);
    if (c.master_kind == Master::low_half) {
      for (int k = n; k % kLanes != 0; ++k) out[k] = 0;
      return join_block(static_cast<const BFloat16*>(c.param) + i, static_cast<const uint16_t*>(c.master) + i, n, out);
    }
  }
  widen_block(c.param, c.dtype, i, n, out);
}

template <class C>
void store_rounded(const MixedChunk& c, const C* in, void* data, core::DataType dtype, int64_t i, int n,
                   const Noise& noise, uint32_t stream) {
  if constexpr (__is_same(C, float)) {
    if (c.stochastic && dtype == core::DataType::bf16) {
      return narrow_stochastically(in, static_cast<BFloat16*>(data), i, n, noise, stream, c.begin + i);
    }
  }
  narrow_block(in, data, dtype, i, n);
}

template <class C>
void store_param(const MixedChunk& c, const C* in, int64_t i, int n, const Noise& noise) {
  if constexpr (__is_same(C, float)) {
    if (c.master_kind == Master::low_half) {
      return split_block(in, static_cast<BFloat16*>(c.param) + i, static_cast<uint16_t*>(c.master) + i, n);
    }
    if (c.master_kind == Master::full) {
      narrow_block(in, c.master, core::DataType::f32, i, n);
      return narrow_block(in, c.param, c.dtype, i, n);
    }
  }
  store_rounded(c, in, c.param, c.dtype, i, n, noise, 0);
}

template <class Rule, int kStates, class C>
void update_mixed(const MixedChunk& c, const Factors<Rule, C>& f) {
  Block<C> block;
  const Noise noise = Noise::of(c.seed, c.step, c.number);
  const Streams<C> streams = {block.param, block.grad, {block.state[0], block.state[1], block.state[2]}};
  for (int64_t i = 0; i < c.n; i += kBlock) {
    const int n = int(c.n - i < kBlock ? c.n - i : kBlock), padded = (n + kLanes - 1) / kLanes * kLanes;
    widen_block(c.grad, c.dtype, i, n, block.grad);
    if (c.facts) {
      const optim::GradSquares grad = squares_of<C>(block.grad, nullptr, n);
      *c.facts += {grad.squares, grad.non_finite, 0, 0};
    }
    if (!c.update) continue;
    load_param(c, i, n, block.param);
    if (c.facts) __builtin_memcpy(block.old_param, block.param, size_t(padded) * sizeof(C));
    for (int k = 0; k < Row::kStates; ++k) {
      if (kStates >> k & 1) widen_block(c.state[k], c.state_dtype, i, n, block.state[k]);
    }
    update<Rule, kStates, C>(streams, n, f);
    store_param(c, block.param, i, n, noise);
    for (int k = 0; k < Row::kStates; ++k) {
      if (kStates >> k & 1) store_rounded(c, block.state[k], c.state[k], c.state_dtype, i, n, noise, 1 + k);
    }
    if (c.facts) {
      load_param(c, i, n, block.param);  // as it was rounded
      const double param = squares_of<C>(block.param, nullptr, n).squares;
      const double update = squares_of<C>(block.param, block.old_param, n).squares;
      *c.facts += {0, 0, param, update};
    }
    if (c.write_grads) {
      const C factor = C(c.grad_factor);
      for (int k = 0; k < n; ++k) block.grad[k] = block.grad[k] * factor;
      narrow_block(block.grad, c.grad, c.dtype, i, n);
    }
  }
}

template <class Rule>
void update_mixed_chunk(const MixedChunk& c, int states, const typename Rule::Scalars& scalars) {
  const auto run = [&]<class C>(C) {
    const auto f = Math<Rule>::template rounded<C>(scalars);
    optim::with_states<Rule>(states, [&]<int kStates>() { update_mixed<Rule, kStates, C>(c, f); });
  };
  c.dtype == core::DataType::f64 ? run(double()) : run(float());
}

template <class Rule>
typename Rule::Scalars scalars(const typename Rule::Group& group, float t, double grad_factor) {
  return Math<Rule>::scalars(group, t, grad_factor);
}

template <class Rule>
constexpr optim::RuleKernels<Rule> make_kernels() {
  return {scalars<Rule>, update_chunk<Rule>, update_mixed_chunk<Rule>};
}

}  // namespace
}  // namespace deepops::DEEPOPS_ISA
