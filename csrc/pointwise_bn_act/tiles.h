// Small matrix products in lanes, for the CPU kernels of pointwise_bn_act.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/lanes.h"
#include "pointwise_bn_act/pointwise_bn_act.h"

#define DEEPOPS_INLINE __attribute__((always_inline)) inline

namespace deepops::DEEPOPS_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

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

// ---- parts of lanes -------------------------------------------------------------------------------------------------

// The first `count` values at p and zeros; nothing behind them is read.
template <class S>
DEEPOPS_INLINE Lanes<S> load_first(const S* p, int64_t count) {
  if (count >= kLanes) return load_lanes(p);
  S values[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = p[i];
  return load_lanes(values);
}

template <class S>
DEEPOPS_INLINE void store_first(S* p, const Lanes<S>& value, int64_t count) {
  if (count >= kLanes) return store_lanes(p, value);
  S values[kLanes];
  store_lanes(values, value);
  for (int64_t i = 0; i < count; ++i) p[i] = values[i];
}

// ---- transposition --------------------------------------------------------------------------------------------------

// a0 b0 a1 b1 ..., of the first halves or of the second.
template <class V>
DEEPOPS_INLINE V interleave_first(V a, V b) {
  if constexpr (sizeof(V) / sizeof(a[0]) == 16) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 8) {
    return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 4) {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <class V>
DEEPOPS_INLINE V interleave_second(V a, V b) {
  if constexpr (sizeof(V) / sizeof(a[0]) == 16) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 8) {
    return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 4) {
    return __builtin_shufflevector(a, b, 2, 6, 3, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// to [columns, rows] = from [rows, columns] turned about its diagonal; both sizes multiples of 16. Squares of one
// vector a row: interleaving row i with row i + size / 2 moves the bits of a value's place on by one, and log2(size)
// times exchanges its row and its column.
template <class S>
DEEPOPS_INLINE void transpose(const S* from, int64_t rows, int64_t columns, S* to) {
  using Value = typename Lanes<S>::Value;
  constexpr int kSize = Lanes<S>::kPerPart;
  for (int64_t row = 0; row < rows; row += kSize)
    for (int64_t column = 0; column < columns; column += kSize) {
      Value square[kSize], next[kSize];
      _Pragma("GCC unroll 16") for (int i = 0; i < kSize; ++i)
          __builtin_memcpy(&square[i], from + (row + i) * columns + column, kVectorBytes);
      _Pragma("GCC unroll 4") for (int step = 1; step < kSize; step *= 2) {
        _Pragma("GCC unroll 8") for (int i = 0; i < kSize / 2; ++i) {
          next[2 * i] = interleave_first(square[i], square[i + kSize / 2]);
          next[2 * i + 1] = interleave_second(square[i], square[i + kSize / 2]);
        }
        _Pragma("GCC unroll 16") for (int i = 0; i < kSize; ++i) square[i] = next[i];
      }
      _Pragma("GCC unroll 16") for (int i = 0; i < kSize; ++i)
          __builtin_memcpy(to + (column + i) * rows + row, &square[i], kVectorBytes);
    }
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
