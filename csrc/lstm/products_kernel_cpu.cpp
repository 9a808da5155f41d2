// CPU kernels of the large products; compiled once per instruction set, raw pointers only.
#include "lstm/products.h"

#include "core/packed_product.h"
#include "lstm/rows.h"

namespace deepops::DEEPOPS_ISA {
namespace {

constexpr int64_t kCached = 65536;  // values of rows that stay in the second-level cache from panel to panel

// `rows` rows of 64 columns from `column` on, 0 beyond the last.
template <class S>
void copy_panel(const S* from, int64_t columns, int64_t column, int64_t rows, S* panel) {
  for (int64_t row = 0; row < rows; ++row)
    for (int lane = 0; lane < kPanel; lane += kLanes) {
      const int64_t valid = columns - column - lane;
      store_lanes(panel + row * kPanel + lane,
                  valid > 0 ? load_part(from + row * columns + column + lane, valid) : Lanes<S>(S(0)));
    }
}

template <class S>
void pack(const RowsProduct& p, const void* weight, bool transposed, int64_t begin, int64_t end) {
  const auto* const from = static_cast<const S*>(weight);
  for (int64_t column = begin * kPanel; column < end * kPanel; column += kPanel) {
    S* const panel = static_cast<S*>(p.panels) + column * p.size;
    if (transposed) {
      pack_transposed(from + column * p.size, least(kPanel, p.columns - column), p.size, panel);
    } else {
      copy_panel(from, p.columns, column, p.size, panel);
    }
  }
}

template <class S>
void rows_product(const RowsProduct& p, int64_t begin, int64_t end) {
  constexpr int64_t kTile = PanelTile<S>::kRows;
  const int64_t tiles = kCached / (p.size + 1) / kTile, at_once = kTile * (tiles < 2 ? 2 : tiles > 16 ? 16 : tiles);
  PanelSums<S> sums;
  for (int64_t block = begin; block < end; block += at_once)
    for (int64_t column = 0; column < p.columns; column += kPanel) {
      const S* const panel = static_cast<const S*>(p.panels) + column * p.size;
      for_row_tiles<S>(block, least(block + at_once, end), [&](int64_t first, int64_t rows) {
        multiply(static_cast<const S*>(p.a) + first * p.size, p.size, rows, p.size, panel, sums.value, false);
        for (int lane = 0; lane < least(kPanel, p.columns - column); lane += kLanes) {
          const int64_t at = column + lane, valid = p.columns - at;
          const Lanes<S> bias = p.bias ? load_part(static_cast<const S*>(p.bias) + at, valid) : Lanes<S>(S(0));
          for (int64_t r = 0; r < rows; ++r)
            store_part(static_cast<S*>(p.out) + (first + r) * p.columns + at,
                       load_lanes(sums.value + r * kPanel + lane) + bias, valid);
        }
      });
    }
}

// Rows [first, first + count) of b become columns of `to`, whose stride is a block.
template <class S>
void transpose_rows(const OuterProduct& p, int64_t first, int64_t count, S* to) {
  int64_t start = 0;  // of a part
  for (const OuterProduct::Rows& part : p.b) {
    const int64_t begin = first > start ? first : start, end = least(first + count, start + part.count);
    if (begin < end)
      transpose(static_cast<const S*>(part.data) + (begin - start) * p.b_columns, p.b_columns, end - begin, p.b_columns,
                to + begin - first, OuterProduct::kBlock);
    start += part.count;
  }
}

// Adds the columns of a panel to `sums`, [64]: a few rows in the type of the data, then in double.
template <class S>
void add_columns(const S* panel, int64_t rows, double* sums) {
  constexpr int64_t kFew = 16;
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    Lanes<double> exact = load_lanes(sums + lane);
    for (int64_t first = 0; first < rows; first += kFew) {
      Lanes<S> sum(S(0));
      for (int64_t row = first; row < least(first + kFew, rows); ++row) sum += load_lanes(panel + row * kPanel + lane);
      exact += widen(sum);
    }
    store_lanes(sums + lane, exact);
  }
}

template <class S>
void outer_product(const OuterProduct& p, void* work, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = OuterProduct::kBlock;
  S* const transposed = static_cast<S*>(work);  // [columns of b][block]
  S* const panel = transposed + p.b_columns * kBlock;
  S* const sums = panel + kBlock * kPanel;  // [panels][columns of b][64]
  const auto* const a = static_cast<const S*>(p.a);
  const int64_t of_panel = p.b_columns * kPanel;
  for (int64_t k = 0; k < p.size; k += kBlock) {
    const int64_t rows = least(kBlock, p.size - k);
    transpose_rows(p, k, rows, transposed);
    for (int64_t index = begin; index < end; ++index) {
      copy_panel(a + k * p.a_columns, p.a_columns, index * kPanel, rows, panel);
      if (p.sums) add_columns(panel, rows, p.exact_sums + index * kPanel);
      for_row_tiles<S>(0, p.b_columns, [&](int64_t first, int64_t count) {
        S* const to = sums + (index - begin) * of_panel + first * kPanel;
        multiply(transposed + first * kBlock, kBlock, count, rows, panel, to, k > 0);
      });
    }
  }
  for (int64_t index = begin; index < end; ++index) {
    const int64_t column = index * kPanel;
    transpose(sums + (index - begin) * of_panel, int64_t(kPanel), p.b_columns, least(kPanel, p.a_columns - column),
              static_cast<S*>(p.out) + column * p.b_columns, p.b_columns);
    for (int64_t at = column; p.sums && at < least(column + kPanel, p.a_columns); ++at)
      static_cast<S*>(p.sums)[at] = S(p.exact_sums[at]);
  }
}

void pack_any(const RowsProduct& p, const void* weight, bool transposed, int64_t begin, int64_t end) {
  p.is_double ? pack<double>(p, weight, transposed, begin, end) : pack<float>(p, weight, transposed, begin, end);
}
void rows_any(const RowsProduct& p, int64_t begin, int64_t end) {
  p.is_double ? rows_product<double>(p, begin, end) : rows_product<float>(p, begin, end);
}
void outer_any(const OuterProduct& p, void* work, int64_t begin, int64_t end) {
  p.is_double ? outer_product<double>(p, work, begin, end) : outer_product<float>(p, work, begin, end);
}

}  // namespace

const ProductKernels lstm_product_kernels = {pack_any, rows_any, outer_any};

}  // namespace deepops::DEEPOPS_ISA
