// Adam on raw pointers, compiled once per instruction set (cmake/CpuIsa.cmake). Plain loops that the compiler
// vectorises; fp16 and bf16 are widened to fp32 a block at a time, in the level-1 cache.
#include "core/lanes.h"
#include "optim/adam.h"
#include "optim/adam_math.h"

namespace deepops::DEEPOPS_ISA {
namespace {

using core::BFloat16;
using core::DataType;
using core::Half;
using optim::AdamChunk;
using optim::AdamScalars;

// to and from: [n]
template <class T>
void widen_block(const T* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes(to + i, load_lanes(from + i));
  for (; i < n; ++i) to[i] = load(from + i);
}

template <class T>
void narrow_block(const float* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_lanes(to + i, load_lanes(from + i));
  for (; i < n; ++i) store(to + i, from[i]);
}

template <bool kGradDecay, bool kAmsgrad, class T>
void update(T* p, const T* g, T* m, T* v, T* v_max, int64_t n, const AdamFactors<T>& factors) {
  const AdamFactors<T> f = factors;  // a copy no store below can alias, so it stays in registers
#pragma GCC ivdep                    // element i of one array meets only element i of the others
  for (int64_t i = 0; i < n; ++i) {
    T unused = 0;
    adam_element<kGradDecay, kAmsgrad>(p[i], g[i], m[i], v[i], kAmsgrad ? v_max[i] : unused, f);
  }
}

template <class T>
AdamFactors<T> factors(const AdamScalars& s) {
  return {T(s.sign),       T(s.param_decay), T(s.grad_decay),      T(s.lerp_weight), T(s.beta2), T(s.one_minus_beta2),
          T(s.bias2_sqrt), T(s.eps),         T(s.minus_step_size), s.lerp_from_grad};
}

template <class T>
void update(T* p, const T* g, T* m, T* v, T* v_max, int64_t n, const AdamFactors<T>& f) {
  const bool grad_decay = f.grad_decay != 0;
  if (grad_decay && v_max) return update<true, true>(p, g, m, v, v_max, n, f);
  if (grad_decay) return update<true, false>(p, g, m, v, v_max, n, f);
  if (v_max) return update<false, true>(p, g, m, v, v_max, n, f);
  update<false, false>(p, g, m, v, v_max, n, f);
}

template <class T>
void direct(const AdamChunk& c, const AdamScalars& s) {
  update(static_cast<T*>(c.p), static_cast<const T*>(c.g), static_cast<T*>(c.m), static_cast<T*>(c.v),
         static_cast<T*>(c.v_max), c.n, factors<T>(s));
}

template <class T>
void through_float(const AdamChunk& c, const AdamScalars& s) {
  constexpr int64_t kBlock = 512;
  float p[kBlock], g[kBlock], m[kBlock], v[kBlock], v_max[kBlock];
  const AdamFactors<float> f = factors<float>(s);
  for (int64_t begin = 0; begin < c.n; begin += kBlock) {
    const int64_t n = c.n - begin < kBlock ? c.n - begin : kBlock;
    T* const stored[] = {static_cast<T*>(c.p) + begin, static_cast<T*>(c.m) + begin, static_cast<T*>(c.v) + begin,
                         c.v_max ? static_cast<T*>(c.v_max) + begin : nullptr};
    float* const wide[] = {p, m, v, v_max};
    const int streams = c.v_max ? 4 : 3;
    widen_block(static_cast<const T*>(c.g) + begin, g, n);
    for (int k = 0; k < streams; ++k) widen_block(stored[k], wide[k], n);
    update(p, g, m, v, c.v_max ? v_max : nullptr, n, f);
    for (int k = 0; k < streams; ++k) narrow_block(wide[k], stored[k], n);
  }
}

}  // namespace

void adam_chunk(const AdamChunk& chunk, const AdamScalars& scalars) {
  switch (chunk.dtype) {
    case DataType::f32:
      return direct<float>(chunk, scalars);
    case DataType::f64:
      return direct<double>(chunk, scalars);
    case DataType::f16:
      return through_float<Half>(chunk, scalars);
    case DataType::bf16:
      return through_float<BFloat16>(chunk, scalars);
  }
}

}  // namespace deepops::DEEPOPS_ISA
