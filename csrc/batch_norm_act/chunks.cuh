// What the GPU kernels of batch_norm_act do with the data of one thread at a time: loads, stores, the formulas.
// The ways through a tensor that hand out the chunks are in planar.cuh and rows.cuh.
#pragma once
#include "core/gpu.cuh"
// after gpu.cuh, which says for what all else is compiled
#include "batch_norm_act/batch_norm_act.h"
#include "batch_norm_act/batch_norm_act_math.h"

namespace deepops::isa_gpu {

using core::OpMath;

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / gpu::kWarp;

// ---- chunks ---------------------------------------------------------------------------------------------------------

// Up to V elements that a thread takes at once, at first, first + step, ...; bit i of `valid`: the i-th is there.
// With all of them and step 1 they are a pack on a 16-byte boundary of every stream, unless V is 1.
template <int V>
struct Chunk {
  static constexpr int kSize = V;
  static constexpr unsigned kAll = (1u << V) - 1;
  int64_t first;
  int step;
  unsigned valid;
  DEEPOPS_DEVICE bool has(int i) const { return valid >> i & 1u; }
  DEEPOPS_DEVICE bool whole() const { return valid == kAll && step == 1; }
};

template <class T, int V>
struct Values {
  T value[V];
};

// Elements that are not there are 0.
template <class T, int V>
DEEPOPS_DEVICE Values<T, V> fetch(const T* p, const Chunk<V>& chunk, gpu::Here here = DEEPOPS_HERE) {
  Values<T, V> values{};
  if constexpr (V > 1) {
    if (chunk.whole()) return __builtin_bit_cast(Values<T, V>, gpu::load_pack(p + chunk.first, here));
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (chunk.has(i)) values.value[i] = gpu::load(p + chunk.first + int64_t(i) * chunk.step, here);
  return values;
}

template <class T, int V>
DEEPOPS_DEVICE void put(T* p, const Chunk<V>& chunk, const OpMath<T> (&from)[V], gpu::Here here = DEEPOPS_HERE) {
  Values<T, V> values;
#pragma unroll
  for (int i = 0; i < V; ++i) values.value[i] = gpu::narrow<T>(from[i]);
  if constexpr (V > 1) {
    if (chunk.whole()) return gpu::store_pack(p + chunk.first, __builtin_bit_cast(gpu::Pack<T>, values), here);
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (chunk.has(i)) gpu::store(p + chunk.first + int64_t(i) * chunk.step, values.value[i], here);
}

// In the type of arithmetic; `missing(i)` stands in for what is not there.
template <class A, class T, int V, class Missing>
DEEPOPS_DEVICE void widen(const Values<T, V>& values, const Chunk<V>& chunk, const Missing& missing, A (&to)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = A(gpu::widen(values.value[i]));
  if (chunk.valid == Chunk<V>::kAll) return;
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (!chunk.has(i)) to[i] = missing(i);
}

// ---- per-channel numbers --------------------------------------------------------------------------------------------

// They go through shared memory, so that a block loads each from global memory once. All are structs of A alone.
template <class A>
struct Shift {
  A near;  // a number near the channel's mean
};

template <class A>
struct Affine {  // z = (x - mean) * scale + bias: the same operations wherever z is needed, so that they agree
  A mean, scale, bias;
  DEEPOPS_DEVICE A operator()(A x) const { return (x - mean) * scale + bias; }
};

template <class A>
struct InputGrad {  // grad_x = scale * (g - mean_grad - (x - mean) * slope_grad)
  Affine<A> affine;
  A mean_grad, slope_grad;
};

template <class A, int n>
struct Array {
  A value[n];
};

// kSlots numbers of type Number, each member in an array of its own.
template <class A, class Number, int kSlots>
struct Staged {
  static constexpr int kMembers = sizeof(Number) / sizeof(A);
  gpu::Shared<A> memory;  // [kMembers * kSlots]
  DEEPOPS_DEVICE void store(int slot, const Number& number, gpu::Here here = DEEPOPS_HERE) const {
    const auto members = __builtin_bit_cast(Array<A, kMembers>, number);
#pragma unroll
    for (int m = 0; m < kMembers; ++m) memory.store(m * kSlots + slot, members.value[m], here);
  }
  DEEPOPS_DEVICE Number load(int slot, gpu::Here here = DEEPOPS_HERE) const {
    Array<A, kMembers> members;
#pragma unroll
    for (int m = 0; m < kMembers; ++m) members.value[m] = memory.load(m * kSlots + slot, here);
    return __builtin_bit_cast(Number, members);
  }
};

template <class Number>
struct MemberOf;
template <template <class> class Number, class A>
struct MemberOf<Number<A>> {
  using Type = A;
};

// Where the numbers of z come from; vectors [C].
template <class A>
struct AffineSource {
  const A *mean, *invstd;
  const A *weight, *bias;  // or null
  DEEPOPS_DEVICE Affine<A> at(int channel) const {
    return of(channel, gpu::load(mean + channel), gpu::load(invstd + channel));
  }
  // Where the statistics were found in the same launch.
  DEEPOPS_DEVICE Affine<A> fresh(int channel) const {
    return of(channel, gpu::load_fresh(mean + channel), gpu::load_fresh(invstd + channel));
  }
  DEEPOPS_DEVICE Affine<A> of(int channel, A center, A scale) const {
    return {center, weight ? gpu::load(weight + channel) * scale : scale, bias ? gpu::load(bias + channel) : A(0)};
  }
};

// ---- sums -----------------------------------------------------------------------------------------------------------

struct Sums {
  double a, b;
};

// Two sums of a thread, for the one channel it works on. Up to V terms are added up in S before they go to double.
template <int V>
struct OneChannelSums {
  double a = 0, b = 0;
  // term(u, i): both terms of element i of chunk u
  template <class S, int U, class Term>
  DEEPOPS_DEVICE void add(const Term& term) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
      S terms_a = 0, terms_b = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) term(u, i, terms_a, terms_b);
      a += terms_a;
      b += terms_b;
    }
  }
};

// The same where each of the V elements of a chunk belongs to a channel of its own, the same one in every chunk.
template <int V>
struct ManyChannelSums {
  double a[V] = {}, b[V] = {};
  template <class S, int U, class Term>
  DEEPOPS_DEVICE void add(const Term& term) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      S terms_a = 0, terms_b = 0;
#pragma unroll
      for (int u = 0; u < U; ++u) term(u, i, terms_a, terms_b);
      a[i] += terms_a;
      b[i] += terms_b;
    }
  }
};

// ---- the data of a pass ---------------------------------------------------------------------------------------------

template <class T>
struct Gradient {  // g = grad_y * act'(z)
  const T *grad_y, *x;
  const T* kept;  // output or residual, or null
  bool kept_is_output;
  Activation activation;
  double negative_slope;
};

template <class T, int V, int U>
struct GradientValues {
  Values<T, V> from_grad_y[U], from_x[U], from_kept[U];
};

template <class T, int V, int U>
DEEPOPS_DEVICE void fetch(const Gradient<T>& args, const Chunk<V> (&chunk)[U], GradientValues<T, V, U>& values) {
#pragma unroll
  for (int u = 0; u < U; ++u) values.from_grad_y[u] = fetch(args.grad_y, chunk[u]);
  if (args.x) {
#pragma unroll
    for (int u = 0; u < U; ++u) values.from_x[u] = fetch(args.x, chunk[u]);
  }
  if (args.kept) {
#pragma unroll
    for (int u = 0; u < U; ++u) values.from_kept[u] = fetch(args.kept, chunk[u]);
  }
}

// g, and x - mean, of U chunks. numbers(i): the Affine of element i. x may be null where x - mean is not wanted.
template <class T, int V, int U, class Numbers>
DEEPOPS_DEVICE void gradient(const Gradient<T>& args, const Chunk<V> (&chunk)[U], const GradientValues<T, V, U>& values,
                             const Numbers& numbers, OpMath<T> (&g)[U][V], OpMath<T> (&centered)[U][V]) {
  using A = OpMath<T>;
  const auto& [grad_y, x, kept] = values;
  A z[U][V];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    widen(grad_y[u], chunk[u], [](int) { return A(0); }, g[u]);
#pragma unroll
    for (int i = 0; i < V; ++i) z[u][i] = centered[u][i] = A(0);
    if (args.x) {
      widen(x[u], chunk[u], [&](int i) { return numbers(i).mean; }, z[u]);  // what is not there adds nothing to sums
#pragma unroll
      for (int i = 0; i < V; ++i) {
        centered[u][i] = z[u][i] - numbers(i).mean;
        z[u][i] = numbers(i)(z[u][i]);
      }
    }
    if (args.kept) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const A value = gpu::widen(kept[u].value[i]);
        z[u][i] = args.kept_is_output ? value : z[u][i] + value;
      }
    }
  }
  with_activation(args.activation, args.negative_slope, [&](const auto& act) {
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int i = 0; i < V; ++i) g[u][i] = act.backward(g[u][i], z[u][i]);
    }
  });
}

}  // namespace deepops::isa_gpu
