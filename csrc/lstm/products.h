// The large products around a sequence on the CPU: inputs and gradients of all steps times a weight, and the gradients
// of weights. With the panels of packed_product.h they take 0.8 of torch.mm's time on an AVX-512 core.
#pragma once
#include <cstdint>

#include "core/cpu_isa.h"
#include "core/panels.h"

namespace deepops {

// out [rows, columns] = a [rows, size] * b, all of one type: float, or double. Panels: b in [panels][size][64].
struct RowsProduct {
  bool is_double;
  int64_t rows, size, columns;
  const void *a, *bias;  // bias: [columns], or null
  void *panels, *out;
};

// out [columns of a, columns of b] = a^T * b, sums over `size` rows; those of b come in two parts, one after the other.
// sums: those of a's columns. work: for each thread work_size() values.
struct OuterProduct {
  struct Rows {
    const void* data;
    int64_t count;
  };
  bool is_double;
  int64_t size, a_columns, b_columns;
  const void* a;
  Rows b[2];
  void *work, *out;
  void* sums;          // [columns of a], or null
  double* exact_sums;  // [panels * 64], zeros; null without sums

  static constexpr int64_t kBlock = 256;  // rows that are summed over before the next panel
  // Of items [begin, end): b^T of a block, a panel of a, and sums of all items.
  int64_t work_size(int64_t items) const {
    return b_columns * kBlock + kBlock * kPanelColumns + items * b_columns * kPanelColumns;
  }
};

struct ProductKernels {
  // weight [columns, size] (transposed) or [size, columns]; panels [begin, end).
  void (*pack)(const RowsProduct&, const void* weight, bool transposed, int64_t begin, int64_t end);
  void (*rows)(const RowsProduct&, int64_t begin, int64_t end);                // over rows
  void (*outer)(const OuterProduct&, void* work, int64_t begin, int64_t end);  // over panels of a's columns
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const ProductKernels lstm_product_kernels;)

}  // namespace deepops
