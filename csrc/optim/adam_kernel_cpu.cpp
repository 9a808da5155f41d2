// Adam on raw pointers, compiled once per instruction set (cmake/CpuIsa.cmake).
#include "core/lanes.h"
#include "optim/adam.h"
#include "optim/adam_math.h"

namespace deepops::DEEPOPS_ISA {

template <class S>
Lanes<S> square_root(Lanes<S> x) {
  constexpr int kParts = Lanes<S>::kParts;
  DEEPOPS_FOR_PARTS(p) {
    for (int i = 0; i < Lanes<S>::kPerPart; ++i) x.part[p][i] = square_root(S(x.part[p][i]));
  }
  return x;
}

// By hand: GCC turns a loop over __builtin_fmaf into scalar instructions.
#if defined(__AVX512F__)
inline __m512 multiply_add_part(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline __m512d multiply_add_part(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif defined(__FMA__)
inline __m256 multiply_add_part(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256d multiply_add_part(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#endif

#ifdef __FMA__
template <class S>
Lanes<S> fused_multiply_add(const Lanes<S>& a, const Lanes<S>& b, Lanes<S> c) {
  constexpr int kParts = Lanes<S>::kParts;
  DEEPOPS_FOR_PARTS(p) c.part[p] = multiply_add_part(a.part[p], b.part[p], c.part[p]);
  return c;
}
#endif

namespace {

using optim::AdamChunk;
using optim::AdamScalars;

// 16 elements, 16-bit ones computed in fp32.
template <bool kGradDecay, bool kAmsgrad, class T>
[[gnu::always_inline]] inline void update_lanes(T* p, const T* g, T* m, T* v, T* v_max,
                                                const AdamFactors<core::OpMath<T>>& f) {
  Lanes<core::OpMath<T>> wide_p = load_lanes(p), wide_m = load_lanes(m), wide_v = load_lanes(v), wide_max;
  if (kAmsgrad) wide_max = load_lanes(v_max);
  adam_element<kGradDecay, kAmsgrad>(wide_p, load_lanes(g), wide_m, wide_v, wide_max, f);
  store_lanes(p, wide_p);
  store_lanes(m, wide_m);
  store_lanes(v, wide_v);
  if (kAmsgrad) store_lanes(v_max, wide_max);
}

template <bool kGradDecay, bool kAmsgrad, class T>
void update(T* p, const T* g, T* m, T* v, T* v_max, int64_t n, const AdamFactors<core::OpMath<T>>& factors) {
  const auto f = factors;  // a copy no store below can alias, so it stays in registers
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    update_lanes<kGradDecay, kAmsgrad>(p + i, g + i, m + i, v + i, kAmsgrad ? v_max + i : nullptr, f);
  }
  if (i == n) return;
  // The last ones as 16 too: one by one, eight take as long as ten times sixteen.
  T tail[5][kLanes] = {};
  T* const streams[5] = {p + i, const_cast<T*>(g) + i, m + i, v + i, kAmsgrad ? v_max + i : nullptr};
  const size_t bytes = size_t(n - i) * sizeof(T);
  for (int s = 0; s < 4 + kAmsgrad; ++s) __builtin_memcpy(tail[s], streams[s], bytes);
  update_lanes<kGradDecay, kAmsgrad>(tail[0], tail[1], tail[2], tail[3], tail[4], f);
  for (int s = 0; s < 4 + kAmsgrad; ++s) {
    if (s != 1) __builtin_memcpy(streams[s], tail[s], bytes);
  }
}

template <bool kGradDecay, bool kAmsgrad, class T>
void update(const AdamChunk& c, const AdamScalars& scalars) {
  auto *p = static_cast<T*>(c.p), *m = static_cast<T*>(c.m), *v = static_cast<T*>(c.v),
       *v_max = static_cast<T*>(c.v_max);
  const auto* g = static_cast<const T*>(c.g);
  update<kGradDecay, kAmsgrad>(p, g, m, v, v_max, c.n, rounded<core::OpMath<T>>(scalars));
}

template <class T>
void update(const AdamChunk& c, const AdamScalars& s) {
  if (s.grad_decay != 0) {
    c.v_max ? update<true, true, T>(c, s) : update<true, false, T>(c, s);
  } else {
    c.v_max ? update<false, true, T>(c, s) : update<false, false, T>(c, s);
  }
}

}  // namespace

AdamScalars adam_scalars(const optim::AdamGroup& group, float t) {
  return scalars_of(group.hyper, power(group.beta1_powers, t), power(group.beta2_powers, t));
}

void adam_chunk(const AdamChunk& chunk, const AdamScalars& scalars) {
  DEEPOPS_DISPATCH_DTYPE(chunk.dtype, [&]<class T>() { update<T>(chunk, scalars); })
}

}  // namespace deepops::DEEPOPS_ISA
