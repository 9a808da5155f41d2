// Small matrix products in lanes, for the CPU kernels of pointwise_bn_act.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/parts.h"
#include "pointwise_bn_act/pointwise_bn_act.h"

namespace deepops::DEEPOPS_ISA {

// What fits into the registers: rows of a tile, and lanes. kBlock is a multiple of every number of rows.
template <class S>
struct TileShape {
  static constexpr int kParts = Lanes<S>::kParts, kRegisters = kVectorBytes == 64 ? 32 : 16;
  static constexpr int kLanesAtOnce = kParts == 1 ? 3 : 1;
  static constexpr int kRows = kRegisters == 32 ? 8 : kParts == 2 ? 6 : kParts == 4 ? 2 : 1;
  static constexpr int kColumns = kLanesAtOnce * kLanes;
  static_assert(PointwiseProblem::kBlock % kRows == 0 && kColumns <= kWidestPanel);
};

// each(r, j, sum of a[r, k] * b[k, 16 j ..] over k < size, from start(r, j) on) for a tile of kRows rows.
// a: [rows, size] with rows `stride` apart, or, transposed, [size, rows]. b: rows `b_stride` apart, lanes `b_next`.
template <class S, int lanes, bool transposed, int kRows = TileShape<S>::kRows, class Start, class Each>
DEEPOPS_INLINE void multiply_tile(const S* a, int64_t stride, const S* b, int64_t b_stride, int64_t b_next,
                                  int64_t size, const Start& start, const Each& each) {
  Lanes<S> sum[kRows][lanes];
  _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {
    _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) sum[r][j] = start(r, j);
  }
  for (int64_t k = 0; k < size; ++k) {
    Lanes<S> column[lanes];
    _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) column[j] = load_lanes(b + k * b_stride + j * b_next);
    _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {
      const Lanes<S> value(transposed ? a[k * stride + r] : a[r * stride + k]);
      _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) sum[r][j] = fma(value, column[j], sum[r][j]);
    }
  }
  _Pragma("GCC unroll 8") for (int r = 0; r < kRows; ++r) {
    _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) each(r, j, sum[r][j]);
  }
}

// call.operator()<lanes>() for a number of lanes known only at run time, from 1 to most.
template <int most, class Call>
DEEPOPS_INLINE void with_lanes(int64_t lanes, const Call& call) {
  if constexpr (most > 1) {
    if (lanes < most) return with_lanes<most - 1>(lanes, call);
  }
  call.template operator()<most>();
}

// ---- a bit a lane ---------------------------------------------------------------------------------------------------

template <class S>
DEEPOPS_INLINE uint16_t bits_of(const typename Lanes<S>::Mask& mask) {
  constexpr int kParts = Lanes<S>::kParts, kPerPart = Lanes<S>::kPerPart;
  uint32_t bits = 0;
  DEEPOPS_FOR_PARTS(p) {
    uint32_t part = 0;
#if defined(__AVX512F__)
    part = sizeof(S) == 4 ? _mm512_movepi32_mask((__m512i)mask.part[p]) : _mm512_movepi64_mask((__m512i)mask.part[p]);
#elif defined(__AVX2__)
    part =
        uint32_t(sizeof(S) == 4 ? _mm256_movemask_ps((__m256)mask.part[p]) : _mm256_movemask_pd((__m256d)mask.part[p]));
#elif defined(__SSE2__)
    part = uint32_t(sizeof(S) == 4 ? _mm_movemask_ps((__m128)mask.part[p]) : _mm_movemask_pd((__m128d)mask.part[p]));
#else
    for (int i = 0; i < kPerPart; ++i) part |= uint32_t(mask.part[p][i] & 1) << i;
#endif
    bits |= part << (p * kPerPart);
  }
  return uint16_t(bits);
}

template <class S>
DEEPOPS_INLINE typename Lanes<S>::Mask mask_of(uint16_t bits) {
  using Int = typename Lanes<S>::Int;
  constexpr int kParts = Lanes<S>::kParts, kPerPart = Lanes<S>::kPerPart;
  typename Lanes<S>::Mask mask;
  DEEPOPS_FOR_PARTS(p) {
    Int single;
    for (int i = 0; i < kPerPart; ++i) single[i] = 1 << (p * kPerPart + i);
    mask.part[p] = ((Int{} + bits) & single) != Int{};
  }
  return mask;
}

}  // namespace deepops::DEEPOPS_ISA
