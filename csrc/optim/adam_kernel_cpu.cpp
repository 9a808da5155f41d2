// Adam on raw pointers, compiled once per instruction set (cmake/CpuIsa.cmake). Plain loops that the compiler
// vectorises; fp16 and bf16 are widened to fp32 a block at a time, in the level-1 cache.
#include "optim/adam.h"
#include "optim/adam_math.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace deepops::DEEPOPS_ISA {
namespace {

using core::BFloat16;
using core::DataType;
using core::Half;
using optim::AdamChunk;
using optim::AdamScalars;

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

inline float widen(BFloat16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }

// Round to nearest, ties to even; every NaN becomes 0x7fc0, as in torch.
inline void narrow(float x, BFloat16& out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}

inline float widen(Half x) {
  const int32_t magnitude = x.bits & 0x7fff;
  const uint32_t normal = (static_cast<uint32_t>(magnitude) << 13) + (112u << 23);
  const uint32_t special =
      (static_cast<uint32_t>(magnitude) << 13) | 0x7f800000u | (magnitude > 0x7c00 ? 0x400000u : 0u);
  const uint32_t subnormal = as_bits(static_cast<float>(magnitude) * 0x1p-24f);
  const uint32_t value = magnitude >= 0x7c00 ? special : magnitude < 0x0400 ? subnormal : normal;
  return as_float(value | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

// Round to nearest, ties to even; a NaN stays a NaN: the bits that the F16C instruction gives.
inline void narrow(float x, Half& out) {
  const uint32_t bits = as_bits(x);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffff);
  const int32_t nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const int32_t normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the subnormal's 10 bits, rounded, at the end of the sum's significand.
  const int32_t subnormal = static_cast<int32_t>(as_bits(as_float(magnitude) + 0.5f) - as_bits(0.5f));
  const int32_t finite = magnitude < 0x38800000 ? subnormal : magnitude >= 0x477ff000 ? 0x7c00 : normal;
  out.bits = static_cast<uint16_t>((magnitude > 0x7f800000 ? nan : finite) | (bits >> 16 & 0x8000));
}

template <class T>
void widen_block(const T* from, float* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  // GCC 12 does not vectorise the conversion by itself.
  if constexpr (__is_same(T, Half)) {
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) to[j] = widen(from[j]);
}

template <class T>
void narrow_block(const float* from, T* to, int64_t n) {
  int64_t i = 0;
#ifdef __F16C__
  if constexpr (__is_same(T, Half)) {
    for (; i + 8 <= n; i += 8) {
      const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), packed);
    }
  }
#endif
#pragma omp simd
  for (int64_t j = i; j < n; ++j) narrow(from[j], to[j]);
}

template <bool kGradDecay, bool kAmsgrad, class T>
void update(T* p, const T* g, T* m, T* v, T* v_max, int64_t n, const AdamFactors<T>& factors) {
  const AdamFactors<T> f = factors;  // a copy no store below can alias, so it stays in registers
#pragma omp simd
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
