// A product with weights that are used again and again: packed once, then multiplied by few rows at a time.
//
// Weights are packed into panels of 64 columns, [K][64] each, in the type that sums are taken in. For the gates a panel
// is 16 hidden units, the columns of i, f, g, o side by side, so that the sums of a row are all that the gate
// arithmetic of these units needs. For the backward's products a panel is 64 neighbouring outputs.
//
// A sum is made of chains of kChain multiply-adds, added up in the order of K, whatever the number of rows and threads:
// same bits. One chain of 512 would be up to three times as far from the sum as torch.mm's result.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/lanes.h"
#include "lstm/panels.h"

namespace deepops::DEEPOPS_ISA {

inline constexpr int kPanel = kPanelColumns, kGates = kPanel / kLanes;
inline constexpr int64_t kChain = 64;
static_assert(kPanelUnits == kLanes);

// ---- packing --------------------------------------------------------------------------------------------------------

// weight [4 * hidden, size], rows from `row` on of all `rows` of the panels: packed [unit blocks][rows][4][16]. Two
// weights can lie one below the other, as if their inputs were one. Units beyond the last are 0.
template <class T, class S>
void pack_gates(const T* weight, int64_t hidden, int64_t size, S* packed, int64_t row, int64_t rows) {
  constexpr int64_t kChunk = 64 / sizeof(T);  // of a row of `weight`: a cache line
  for (int64_t block = 0; block < unit_blocks_of(hidden); ++block) {
    S* const panel = packed + (block * rows + row) * kPanel;
    for (int64_t begin = 0; begin < size; begin += kChunk) {
      const int64_t end = begin + kChunk < size ? begin + kChunk : size;
      for (int64_t column = 0; column < kPanel; ++column) {
        const int64_t gate = column / kLanes, unit = block * kLanes + column % kLanes;
        const T* const from = weight + (gate * hidden + unit) * size;
        for (int64_t k = begin; k < end; ++k) panel[k * kPanel + column] = unit < hidden ? load(from + k) : S(0);
      }
    }
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
struct TileShape {
  static constexpr int kParts = Lanes<S>::kParts, kRegisters = kVectorBytes == 64 ? 32 : 16;
  static constexpr int kRows = kRegisters / kParts - 1 < 6 ? kRegisters / kParts - 1 : 6;
  static constexpr int lanes(int rows) {
    int count = kGates;
    while (count > 1 && (rows + 1) * count * kParts >= kRegisters) count /= 2;
    return count;
  }
};

// sums [rows][64] = a [rows, size] * panel [size][64], or += it. stride: between the rows of a.
template <class S, int rows>
void multiply_tile(const S* a, int64_t stride, int64_t size, const S* panel, S* sums, bool add) {
  constexpr int kAtOnce = TileShape<S>::lanes(rows);
  for (int first = 0; first < kPanel; first += kAtOnce * kLanes) {
    for (int64_t begin = 0; begin < size || begin == 0; begin += kChain) {
      const int64_t end = size - begin < kChain ? size : begin + kChain;
      const bool on_top = add || begin > 0;
      Lanes<S> sum[rows][kAtOnce];
      _Pragma("GCC unroll 8") for (int r = 0; r < rows; ++r) {
        _Pragma("GCC unroll 4") for (int j = 0; j < kAtOnce; ++j) sum[r][j] = Lanes<S>(S(0));
      }
      const S* b = panel + begin * kPanel + first;
      for (int64_t k = begin; k < end; ++k, b += kPanel) {
        Lanes<S> column[kAtOnce];
        _Pragma("GCC unroll 4") for (int j = 0; j < kAtOnce; ++j) column[j] = load_lanes(b + j * kLanes);
        _Pragma("GCC unroll 8") for (int r = 0; r < rows; ++r) {
          const Lanes<S> value(a[r * stride + k]);
          _Pragma("GCC unroll 4") for (int j = 0; j < kAtOnce; ++j) sum[r][j] = fma(value, column[j], sum[r][j]);
        }
      }
      _Pragma("GCC unroll 8") for (int r = 0; r < rows; ++r) {
        _Pragma("GCC unroll 4") for (int j = 0; j < kAtOnce; ++j) {
          S* const to = sums + r * kPanel + first + j * kLanes;
          store_lanes(to, on_top ? load_lanes(to) + sum[r][j] : sum[r][j]);
        }
      }
    }
  }
}

// The same for a number of rows known only at run time, from 1 to TileShape<S>::kRows.
template <class S, int most = TileShape<S>::kRows>
void multiply(const S* a, int64_t stride, int64_t rows, int64_t size, const S* panel, S* sums, bool add) {
  if constexpr (most > 1) {
    if (rows < most) return multiply<S, most - 1>(a, stride, rows, size, panel, sums, add);
  }
  multiply_tile<S, most>(a, stride, size, panel, sums, add);
}

// each(first, rows) for tiles of [begin, end), as equal as possible: a tile of one row costs as much as one of three.
template <class S, class Each>
void for_row_tiles(int64_t begin, int64_t end, const Each& each) {
  constexpr int64_t kRows = TileShape<S>::kRows;
  for (int64_t tiles = (end - begin + kRows - 1) / kRows; tiles > 0; --tiles) {
    const int64_t rows = (end - begin + tiles - 1) / tiles;
    each(begin, rows);
    begin += rows;
  }
}

// Memory for the sums of a tile.
template <class S>
struct TileSums {
  alignas(64) S value[TileShape<S>::kRows * kPanel];
};

}  // namespace deepops::DEEPOPS_ISA
