// A product with weights that are used again and again: packed once, then multiplied by few rows at a time.
//
// Weights are packed into panels of 64 columns, [K][64] each, in the type that sums are taken in. What the columns are
// is up to the op: neighbouring outputs, or whatever its epilogue needs side by side.
//
// A sum is made of chains of kChain multiply-adds, added up in the order of K, whatever the number of rows and threads:
// same bits. One chain of 512 would be up to three times as far from the sum as torch.mm's result.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/lanes.h"
#include "core/panels.h"

namespace deepops::DEEPOPS_ISA {

inline constexpr int kPanel = kPanelColumns, kPanelLanes = kPanel / kLanes;
inline constexpr int64_t kChain = 64;

// ---- packing --------------------------------------------------------------------------------------------------------

// Four rows of four values become four columns.
template <class T, class S>
void turn_fours(const T* from, int64_t from_stride, S* to, int64_t stride) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) to[j * stride + i] = load(from + i * from_stride + j);
}
#ifdef __SSE2__
inline void turn_fours(const float* from, int64_t from_stride, float* to, int64_t stride) {
  __m128 row[4];
  for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_ps(from + i * from_stride);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(to + i * stride, row[i]);
}
#endif

// [rows, columns] with `from_stride` between its rows becomes [columns][stride]; 16 columns at a time, so that a line
// that is read is used up while it is there. Fours at once take half of the time.
template <class T, class S>
void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, S* to, int64_t stride) {
  for (int64_t first = 0; first < columns; first += kLanes) {
    const int64_t last = columns - first < kLanes ? columns : first + kLanes;
    for (int64_t row = 0; row < rows;) {
      const int64_t height = rows - row < 4 ? 1 : 4;
      int64_t column = first;
      for (; height == 4 && column + 4 <= last; column += 4)
        turn_fours(from + row * from_stride + column, from_stride, to + column * stride + row, stride);
      for (; column < last; ++column)
        for (int64_t i = row; i < row + height; ++i) to[column * stride + i] = load(from + i * from_stride + column);
      row += height;
    }
  }
}

// weight [columns, size]: packed [panels][size][64]. Columns beyond the last are 0.
template <class T, class S>
void pack_transposed(const T* weight, int64_t columns, int64_t size, S* packed) {
  for (int64_t column = 0; column < columns; column += kPanel, packed += size * kPanel) {
    const int64_t valid = columns - column < kPanel ? columns - column : kPanel;
    for (int64_t k = 0; valid < kPanel && k < size * kPanel; ++k) packed[k] = 0;
    transpose(weight + column * size, size, valid, size, packed, int64_t(kPanel));
  }
}

// weight [rows, columns]: packed [panels][rows][64]. Columns beyond the last are 0.
template <class T, class S>
void pack_columns(const T* weight, int64_t rows, int64_t columns, S* packed) {
  for (int64_t first = 0; first < columns; first += kPanel)
    for (int64_t row = 0; row < rows; ++row, packed += kPanel) {
      const T* const from = weight + row * columns + first;
      if (columns - first >= kPanel) {
        for (int lane = 0; lane < kPanel; lane += kLanes) store_lanes(packed + lane, load_lanes(from + lane));
      } else {
        for (int64_t c = 0; c < kPanel; ++c) packed[c] = first + c < columns ? load(from + c) : S(0);
      }
    }
}

// ---- the product ----------------------------------------------------------------------------------------------------

// What fits into the registers: rows, and lanes of a panel that are multiplied at once. Few rows take more lanes, to
// have as many chains of additions under way.
template <class S>
struct PanelTile {
  static constexpr int kParts = Lanes<S>::kParts, kRegisters = kVectorBytes == 64 ? 32 : 16;
  static constexpr int kRows = kRegisters / kParts - 1 < 6 ? kRegisters / kParts - 1 : 6;
  static constexpr int lanes(int rows) {
    int count = kPanelLanes;
    while (count > 1 && (rows + 1) * count * kParts >= kRegisters) count /= 2;
    return count;
  }
};

// sums [rows][64] = a [rows, size] * panel [size][64], or += it, in `lanes` lanes. stride: between the rows of a.
template <class S, int rows, int lanes>
void multiply_lanes(const S* a, int64_t stride, int64_t size, const S* panel, S* sums, bool add) {
  for (int64_t begin = 0; begin < size || begin == 0; begin += kChain) {
    const int64_t end = size - begin < kChain ? size : begin + kChain;
    const bool on_top = add || begin > 0;
    Lanes<S> sum[rows][lanes];
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; ++r) {
      _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) sum[r][j] = Lanes<S>(S(0));
    }
    const S* b = panel + begin * kPanel;
    for (int64_t k = begin; k < end; ++k, b += kPanel) {
      Lanes<S> column[lanes];
      _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) column[j] = load_lanes(b + j * kLanes);
      _Pragma("GCC unroll 8") for (int r = 0; r < rows; ++r) {
        const Lanes<S> value(a[r * stride + k]);
        _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) sum[r][j] = fma(value, column[j], sum[r][j]);
      }
    }
    _Pragma("GCC unroll 8") for (int r = 0; r < rows; ++r) {
      _Pragma("GCC unroll 4") for (int j = 0; j < lanes; ++j) {
        S* const to = sums + r * kPanel + j * kLanes;
        store_lanes(to, on_top ? load_lanes(to) + sum[r][j] : sum[r][j]);
      }
    }
  }
}

// The first `columns` columns, with those that share lanes with them.
template <class S, int rows>
void multiply_tile(const S* a, int64_t stride, int64_t size, const S* panel, S* sums, bool add, int columns) {
  constexpr int kAtOnce = PanelTile<S>::lanes(rows);
  int first = 0;
  for (; columns - first > (kAtOnce - 1) * kLanes; first += kAtOnce * kLanes)
    multiply_lanes<S, rows, kAtOnce>(a, stride, size, panel + first, sums + first, add);
  if constexpr (kAtOnce > 2) {
    if (columns - first > kLanes) {
      multiply_lanes<S, rows, 2>(a, stride, size, panel + first, sums + first, add);
      first += 2 * kLanes;
    }
  }
  if constexpr (kAtOnce > 1) {
    if (columns > first) multiply_lanes<S, rows, 1>(a, stride, size, panel + first, sums + first, add);
  }
}

// The same for a number of rows known only at run time, from 1 to PanelTile<S>::kRows.
template <class S, int most = PanelTile<S>::kRows>
void multiply(const S* a, int64_t stride, int64_t rows, int64_t size, const S* panel, S* sums, bool add,
              int columns = kPanel) {
  if constexpr (most > 1) {
    if (rows < most) return multiply<S, most - 1>(a, stride, rows, size, panel, sums, add, columns);
  }
  multiply_tile<S, most>(a, stride, size, panel, sums, add, columns);
}

// each(first, rows) for tiles of [begin, end), as equal as possible: a tile of one row costs as much as one of three.
template <class S, class Each>
void for_row_tiles(int64_t begin, int64_t end, const Each& each) {
  constexpr int64_t kRows = PanelTile<S>::kRows;
  for (int64_t tiles = (end - begin + kRows - 1) / kRows; tiles > 0; --tiles) {
    const int64_t rows = (end - begin + tiles - 1) / tiles;
    each(begin, rows);
    begin += rows;
  }
}

// Memory for the sums of a tile.
template <class S>
struct PanelSums {
  alignas(64) S value[PanelTile<S>::kRows * kPanel];
};

}  // namespace deepops::DEEPOPS_ISA
