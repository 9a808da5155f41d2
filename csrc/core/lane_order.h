// Lanes in another order: every second value of two, and matrices turned about their diagonal.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/parts.h"

namespace deepops::DEEPOPS_ISA {

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

// The even or the odd ones of a0 a1 ... b0 b1 ...
template <class V>
DEEPOPS_INLINE V even_ones(V a, V b) {
  if constexpr (sizeof(V) / sizeof(a[0]) == 16) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 4) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  } else {
    return __builtin_shufflevector(a, b, 0, 2);
  }
}
template <class V>
DEEPOPS_INLINE V odd_ones(V a, V b) {
  if constexpr (sizeof(V) / sizeof(a[0]) == 16) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 8) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else if constexpr (sizeof(V) / sizeof(a[0]) == 4) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  } else {
    return __builtin_shufflevector(a, b, 1, 3);
  }
}

// 32 values in two lanes, a then b: those at even places into `even`, the others into `odd`; and back.
template <class S>
DEEPOPS_INLINE void split(const Lanes<S>& a, const Lanes<S>& b, Lanes<S>& even, Lanes<S>& odd) {
  constexpr int kParts = Lanes<S>::kParts;
  typename Lanes<S>::Value all[2 * kParts];
  DEEPOPS_FOR_PARTS(k) all[k] = a.part[k], all[kParts + k] = b.part[k];
  DEEPOPS_FOR_PARTS(k) {
    even.part[k] = even_ones(all[2 * k], all[2 * k + 1]);
    odd.part[k] = odd_ones(all[2 * k], all[2 * k + 1]);
  }
}
template <class S>
DEEPOPS_INLINE void join(const Lanes<S>& even, const Lanes<S>& odd, Lanes<S>& a, Lanes<S>& b) {
  constexpr int kParts = Lanes<S>::kParts;
  typename Lanes<S>::Value all[2 * kParts];
  DEEPOPS_FOR_PARTS(k) {
    all[2 * k] = interleave_first(even.part[k], odd.part[k]);
    all[2 * k + 1] = interleave_second(even.part[k], odd.part[k]);
  }
  DEEPOPS_FOR_PARTS(k) a.part[k] = all[k], b.part[k] = all[kParts + k];
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

}  // namespace deepops::DEEPOPS_ISA
