// Lanes<S>: 16 values of S (float or double) that a kernel computes with at once.
//
// Always 16, whatever the machine's vector width: a sum kept in 16 lanes and folded by a fixed tree has the same bits
// on every instruction set. (GCC keeps plain `double s[16]` accumulators in memory: 7.8 GB/s against 25 GB/s measured
// for the same reduction with vector types, so these are vector types.) Loads and stores convert 16-bit data.
//
// Everything here lives in the namespace of the instruction set it is compiled for; include it from kernel files only.
#pragma once
#include <cstdint>

#include "core/dtype.h"

#ifndef DEEPOPS_ISA
#error "core/lanes.h is for files compiled once per instruction set (cmake/CpuIsa.cmake)"
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace deepops::DEEPOPS_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif
inline constexpr int kLanes = 16;

template <class S>
struct NativeVector;
template <>
struct NativeVector<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
};
template <>
struct NativeVector<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};

#define DEEPOPS_FOR_PARTS(p) _Pragma("GCC unroll 8") for (int p = 0; p < kParts; ++p)

template <class S>
struct Lanes {
  using Scalar = S;
  using Value = typename NativeVector<S>::Value;
  using Int = typename NativeVector<S>::Int;
  static constexpr int kParts = kLanes * int(sizeof(S)) / kVectorBytes;
  static constexpr int kPerPart = kLanes / kParts;

  struct Mask {
    Int part[kParts];
    friend Mask operator|(const Mask& a, const Mask& b) {
      Mask out;
      DEEPOPS_FOR_PARTS(p) out.part[p] = a.part[p] | b.part[p];
      return out;
    }
  };

  Value part[kParts];

  Lanes() = default;
  Lanes(S value) {  // implicit on purpose: formulas mix lanes and constants
    DEEPOPS_FOR_PARTS(p) part[p] = value - Value{};
  }

  S operator[](int lane) const { return part[lane / kPerPart][lane % kPerPart]; }
  void set(int lane, S value) { part[lane / kPerPart][lane % kPerPart] = value; }

#define DEEPOPS_LANES_OPERATOR(op)                             \
  friend Lanes operator op(const Lanes& a, const Lanes& b) {   \
    Lanes out;                                                 \
    DEEPOPS_FOR_PARTS(p) out.part[p] = a.part[p] op b.part[p]; \
    return out;                                                \
  }
  DEEPOPS_LANES_OPERATOR(+)
  DEEPOPS_LANES_OPERATOR(-)
  DEEPOPS_LANES_OPERATOR(*)
  DEEPOPS_LANES_OPERATOR(/)
#undef DEEPOPS_LANES_OPERATOR
#define DEEPOPS_LANES_COMPARE(op)                              \
  friend Mask operator op(const Lanes& a, const Lanes& b) {    \
    Mask out;                                                  \
    DEEPOPS_FOR_PARTS(p) out.part[p] = a.part[p] op b.part[p]; \
    return out;                                                \
  }
  DEEPOPS_LANES_COMPARE(<)
  DEEPOPS_LANES_COMPARE(<=)
  DEEPOPS_LANES_COMPARE(>)
  DEEPOPS_LANES_COMPARE(>=)
#undef DEEPOPS_LANES_COMPARE
  Lanes& operator+=(const Lanes& other) { return *this = *this + other; }
};

template <class S>
Lanes<S> select(const typename Lanes<S>::Mask& mask, const Lanes<S>& yes, const Lanes<S>& no) {
  constexpr int kParts = Lanes<S>::kParts;
  Lanes<S> out;
  DEEPOPS_FOR_PARTS(p) out.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
  return out;
}

// Lane numbers 0 .. 15, for masks.
template <class S>
Lanes<S> lane_numbers() {
  Lanes<S> out;
  for (int lane = 0; lane < kLanes; ++lane) out.set(lane, S(lane));
  return out;
}

inline NativeVector<float>::Value fma_part(NativeVector<float>::Value a, NativeVector<float>::Value b,
                                           NativeVector<float>::Value c) {
#if defined(__AVX512F__)
  return (NativeVector<float>::Value)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (NativeVector<float>::Value)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline NativeVector<double>::Value fma_part(NativeVector<double>::Value a, NativeVector<double>::Value b,
                                            NativeVector<double>::Value c) {
#if defined(__AVX512F__)
  return (NativeVector<double>::Value)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (NativeVector<double>::Value)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// a * b + c. Rounded once where the instruction set has a fused multiply-add, twice elsewhere: for matrix products,
// which would take twice as long without it, and not where every instruction set must give the same bits.
template <class S>
Lanes<S> fma(const Lanes<S>& a, const Lanes<S>& b, const Lanes<S>& c) {
  constexpr int kParts = Lanes<S>::kParts;
  Lanes<S> out;
  DEEPOPS_FOR_PARTS(p) out.part[p] = fma_part(a.part[p], b.part[p], c.part[p]);
  return out;
}

inline Lanes<float> shift_left_into_exponent(const Lanes<float>& value) {
  constexpr int kParts = Lanes<float>::kParts;
  Lanes<float> out;
  DEEPOPS_FOR_PARTS(p) out.part[p] = (Lanes<float>::Value)((Lanes<float>::Int)value.part[p] << 23);
  return out;
}

// ---- 16-bit conversions ---------------------------------------------------------------------------------------------

// U is uint32_t or a vector of them. The upper half is the number rounded to nearest even, unless it is NaN.
template <class U>
U rounded_to_upper_half(U bits) {
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// Every NaN becomes the quiet 0x7fc0, as in torch.
template <class U>
U bfloat16_bits_of(U bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? U{} + 0x7fc0u : rounded_to_upper_half(bits) >> 16;
}

inline float to_float(core::BFloat16 value) { return __builtin_bit_cast(float, uint32_t(value.bits) << 16); }

#ifdef __F16C__
inline float to_float(core::Half value) { return _cvtsh_ss(value.bits); }
inline core::Half to_half(float value) { return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)}; }
#else
inline float to_float(core::Half value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13, sign = uint32_t(value.bits & 0x8000) << 16;
  // Exponents differ by 112; the product also normalises subnormals. Inf and NaN take the all-ones exponent.
  const float finite = __builtin_bit_cast(float, magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= (0x7c00u << 13) ? (magnitude | 0x7f800000u) : __builtin_bit_cast(uint32_t, finite);
  return __builtin_bit_cast(float, bits | sign);
}
inline core::Half to_half(float value) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and up
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14, subnormal: 0.5 has the ulp 2^-24 wanted, so + rounds
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  } else {  // rebias the exponent by -112, round the 13 lost bits to nearest even
    half = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {uint16_t(half | (sign >> 16))};
}
#endif

// ---- loads and stores -----------------------------------------------------------------------------------------------

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const core::Half* p) { return to_float(*p); }
inline float load(const core::BFloat16* p) { return to_float(*p); }

inline void store(float* p, float value) { *p = value; }
inline void store(double* p, double value) { *p = value; }
inline void store(core::Half* p, float value) { *p = to_half(value); }
inline void store(core::BFloat16* p, float value) {
  *p = {uint16_t(bfloat16_bits_of(__builtin_bit_cast(uint32_t, value)))};
}

// Part by part: one memcpy of the whole array would go through the stack.
template <class S>
Lanes<S> load_lanes(const S* p) {
  constexpr int kParts = Lanes<S>::kParts;
  Lanes<S> out;
  DEEPOPS_FOR_PARTS(k) __builtin_memcpy(&out.part[k], p + k * Lanes<S>::kPerPart, kVectorBytes);
  return out;
}

template <class S>
void store_lanes(S* p, const Lanes<S>& value) {
  constexpr int kParts = Lanes<S>::kParts;
  DEEPOPS_FOR_PARTS(k) __builtin_memcpy(p + k * Lanes<S>::kPerPart, &value.part[k], kVectorBytes);
}

// Stores past the caches, for results that would not stay there: memory need not be read before it is written.
// p: on a boundary of kVectorBytes. finish_streaming() makes what this thread wrote visible to others.
template <class S>
void stream_lanes(S* p, const Lanes<S>& value) {
  constexpr int kParts = Lanes<S>::kParts;
  DEEPOPS_FOR_PARTS(k) {
    float* at = reinterpret_cast<float*>(p + k * Lanes<S>::kPerPart);
#if defined(__AVX512F__)
    _mm512_stream_ps(at, (__m512)value.part[k]);
#elif defined(__AVX2__)
    _mm256_stream_ps(at, (__m256)value.part[k]);
#elif defined(__SSE2__)
    _mm_stream_ps(at, (__m128)value.part[k]);
#else
    __builtin_memcpy(at, &value.part[k], kVectorBytes);
#endif
  }
}
inline void finish_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

typedef uint16_t U16Part __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t U32Part __attribute__((vector_size(kVectorBytes)));

// By hand for AVX-512, where GCC 12 takes apart one conversion into two halves and their shuffles.
inline U32Part widen_bits(U16Part bits) {
#if defined(__AVX512F__)
  return (U32Part)_mm512_cvtepu16_epi32((__m256i)bits);
#else
  return __builtin_convertvector(bits, U32Part);
#endif
}
inline U16Part narrow_bits(U32Part bits) {
#if defined(__AVX512F__)
  return (U16Part)_mm512_cvtepi32_epi16((__m512i)bits);
#else
  return __builtin_convertvector(bits, U16Part);
#endif
}

inline Lanes<float> load_lanes(const core::BFloat16* p) {
  constexpr int kParts = Lanes<float>::kParts, kPerPart = Lanes<float>::kPerPart;
  Lanes<float> out;
  DEEPOPS_FOR_PARTS(k) {
    U16Part bits;
    __builtin_memcpy(&bits, p + k * kPerPart, sizeof bits);
    out.part[k] = (Lanes<float>::Value)(widen_bits(bits) << 16);
  }
  return out;
}

inline void store_lanes(core::BFloat16* p, const Lanes<float>& value) {
  constexpr int kParts = Lanes<float>::kParts, kPerPart = Lanes<float>::kPerPart;
  DEEPOPS_FOR_PARTS(k) {
    const U16Part narrow = narrow_bits(bfloat16_bits_of((U32Part)value.part[k]));
    __builtin_memcpy(p + k * kPerPart, &narrow, sizeof narrow);
  }
}

inline Lanes<float> load_lanes(const core::Half* p) {
  Lanes<float> out;
#if defined(__AVX512F__)
  out.part[0] = (Lanes<float>::Value)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  for (int k = 0; k < 2; ++k) out.part[k] = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8 * k)));
#else
  for (int lane = 0; lane < kLanes; ++lane) out.set(lane, to_float(p[lane]));
#endif
  return out;
}

inline void store_lanes(core::Half* p, const Lanes<float>& value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)value.part[0], _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  for (int k = 0; k < 2; ++k)
    _mm_storeu_si128((__m128i*)(p + 8 * k), _mm256_cvtps_ph((__m256)value.part[k], _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = to_half(value[lane]);
#endif
}

// ---- sums in double -------------------------------------------------------------------------------------------------

inline double widen(float value) { return value; }
inline double widen(double value) { return value; }
inline Lanes<double> widen(const Lanes<double>& value) { return value; }
// Half `half` of a vector of floats, as doubles.
template <int half>
Lanes<double>::Value widen_half(Lanes<float>::Value value) {
#if defined(__AVX512F__)
  constexpr int i = 8 * half;
  return __builtin_convertvector(
      __builtin_shufflevector(value, value, i, i + 1, i + 2, i + 3, i + 4, i + 5, i + 6, i + 7), Lanes<double>::Value);
#elif defined(__AVX2__)
  constexpr int i = 4 * half;
  return __builtin_convertvector(__builtin_shufflevector(value, value, i, i + 1, i + 2, i + 3), Lanes<double>::Value);
#else
  constexpr int i = 2 * half;
  return __builtin_convertvector(__builtin_shufflevector(value, value, i, i + 1), Lanes<double>::Value);
#endif
}
inline Lanes<double> widen(const Lanes<float>& value) {
  constexpr int kParts = Lanes<float>::kParts;
  Lanes<double> out;
  DEEPOPS_FOR_PARTS(p) {
    out.part[2 * p] = widen_half<0>(value.part[p]);
    out.part[2 * p + 1] = widen_half<1>(value.part[p]);
  }
  return out;
}

// Fixed tree: lane i with lane i + 8, then + 4, + 2, + 1; the first levels by whole vectors.
inline double sum_of_lanes(const Lanes<double>& value) {
  constexpr int kParts = Lanes<double>::kParts, kPerPart = Lanes<double>::kPerPart;
  Lanes<double> sum = value;
  for (int width = kParts / 2; width >= 1; width /= 2)
    for (int p = 0; p < width; ++p) sum.part[p] += sum.part[p + width];
  double lanes[kPerPart];
  __builtin_memcpy(lanes, &sum.part[0], sizeof lanes);
  for (int width = kPerPart / 2; width >= 1; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace deepops::DEEPOPS_ISA
