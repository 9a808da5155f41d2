// Parts of lanes: what stands at the end of a row.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/lanes.h"

#define DEEPOPS_INLINE __attribute__((always_inline)) inline

namespace deepops::DEEPOPS_ISA {

template <class T>
using LanesOf = Lanes<core::OpMath<T>>;

// Of each part of 16 lanes, those among the first `count`.
template <class S>
DEEPOPS_INLINE typename Lanes<S>::Int first_lanes(int part, int64_t count) {
  typename Lanes<S>::Int lane;
  for (int i = 0; i < Lanes<S>::kPerPart; ++i) lane[i] = part * Lanes<S>::kPerPart + i;
  return lane < typename Lanes<S>::Int{} + static_cast<decltype(lane[0] + 0)>(count > kLanes ? kLanes : count);
}

#if defined(__AVX512F__)
inline uint32_t lane_bits(int64_t count) { return count > 0 ? (1u << count) - 1 : 0; }

inline Lanes<float> load_masked(const float* p, int64_t count) {
  Lanes<float> out;
  out.part[0] = (Lanes<float>::Value)_mm512_maskz_loadu_ps(__mmask16(lane_bits(count)), p);
  return out;
}
inline Lanes<double> load_masked(const double* p, int64_t count) {
  Lanes<double> out;
  for (int k = 0; k < 2; ++k)
    out.part[k] = (Lanes<double>::Value)_mm512_maskz_loadu_pd(__mmask8(lane_bits(count) >> (8 * k)), p + 8 * k);
  return out;
}
inline void store_masked(float* p, const Lanes<float>& value, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16(lane_bits(count)), (__m512)value.part[0]);
}
inline void store_masked(double* p, const Lanes<double>& value, int64_t count) {
  for (int k = 0; k < 2; ++k)
    _mm512_mask_storeu_pd(p + 8 * k, __mmask8(lane_bits(count) >> (8 * k)), (__m512d)value.part[k]);
}
#elif defined(__AVX2__)
inline Lanes<float> load_masked(const float* p, int64_t count) {
  Lanes<float> out;
  for (int k = 0; k < 2; ++k)
    out.part[k] = (Lanes<float>::Value)_mm256_maskload_ps(p + 8 * k, (__m256i)first_lanes<float>(k, count));
  return out;
}
inline Lanes<double> load_masked(const double* p, int64_t count) {
  Lanes<double> out;
  for (int k = 0; k < 4; ++k)
    out.part[k] = (Lanes<double>::Value)_mm256_maskload_pd(p + 4 * k, (__m256i)first_lanes<double>(k, count));
  return out;
}
inline void store_masked(float* p, const Lanes<float>& value, int64_t count) {
  for (int k = 0; k < 2; ++k)
    _mm256_maskstore_ps(p + 8 * k, (__m256i)first_lanes<float>(k, count), (__m256)value.part[k]);
}
inline void store_masked(double* p, const Lanes<double>& value, int64_t count) {
  for (int k = 0; k < 4; ++k)
    _mm256_maskstore_pd(p + 4 * k, (__m256i)first_lanes<double>(k, count), (__m256d)value.part[k]);
}
#endif

// The first `count` of 16 values, 0 beyond; nothing behind them is read. With the instructions made for it where there
// are any: rows of 14 values would take most of their time here otherwise.
template <class T>
LanesOf<T> load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load_lanes(p);
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) return load_masked(p, count);
#endif
  T values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load_lanes(values);
}

template <class T>
void store_part(T* p, const LanesOf<T>& value, int64_t count) {
  if (count >= kLanes) return store_lanes(p, value);
#if defined(__AVX512F__) || defined(__AVX2__)
  if constexpr (sizeof(T) >= 4) return store_masked(p, value, count);
#endif
  T values[kLanes];
  store_lanes(values, value);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

// `value` with zeros from lane `count` on.
template <class S>
DEEPOPS_INLINE Lanes<S> first_of(const Lanes<S>& value, int64_t count) {
  constexpr int kParts = Lanes<S>::kParts;
  Lanes<S> out;
  DEEPOPS_FOR_PARTS(k) out.part[k] = first_lanes<S>(k, count) ? value.part[k] : typename Lanes<S>::Value{};
  return out;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace deepops::DEEPOPS_ISA
