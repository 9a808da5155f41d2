// lstm_pack, lstm_cell and its backward: types and kernel declarations. One step of an LSTM without layer norm,
// projection and randomness; deepops/reference/lstm.py has the formulas, with T = 1.
//
// Weights are packed for both directions, in the type that sums are taken in:
//   [unit blocks][I + H][4][16]   for the gates: x and h side by side are the rows that are multiplied with it
//   [panels of I][4H][64]         for grad_x
//   [panels of H][4H][64]         for grad_h
#pragma once
#include "lstm/lstm.h"
#include "lstm/panels.h"

namespace deepops {

struct CellShape : LstmFormula {
  core::DataType dtype;
  int64_t batch, input, hidden;  // B, I, H

  int64_t gates() const { return 4 * hidden; }
  int64_t grad_x_at() const { return unit_blocks_of(hidden) * (input + hidden) * kPanelColumns; }
  int64_t grad_h_at() const { return grad_x_at() + panels_of(input) * gates() * kPanelColumns; }
  int64_t packed_size() const { return grad_h_at() + panels_of(hidden) * gates() * kPanelColumns; }

  // Rows that one work item multiplies with a panel: as equal as possible, and four tiles at most.
  int64_t row_groups() const { return (batch + kRowsPerItem - 1) / kRowsPerItem; }
  int64_t first_row(int64_t group) const { return group * batch / row_groups(); }

  static constexpr int64_t kRowsPerItem = 24;
};

// Rows of [B, ..]; the values of a row are adjacent.
struct CellRows {
  const void* data;  // or null: not given
  int64_t stride;
};

// "sums": in float, or double for f64 data.
struct CellForward {
  CellRows x, h;  // sums
  CellRows c;
  const void* packed;    // sums
  const void* bias;      // [4H], sums, or null
  const void* peephole;  // [3H], or null
  void *new_h, *new_c;   // [B, H]
  void* gates;           // [B, 4H], or null
};

struct CellBackward {
  CellRows grad_h, grad_c, c_before;
  const void* gates;     // [B, 4H]
  const void* packed;    // sums
  const void* peephole;  // [3H], or null
  void* grad_gates;      // [B, 4H]
  void* grad_sums;       // the same in sums; grad_gates itself where the types are the same
  void* grad_x;          // [B, I], or null
  void* grad_new_h;      // [B, H], or null: of h before the step
  void* grad_new_c;      // [B, H]: of c before the step
  void* grad_peephole;   // [3H], sums
};

struct CellKernels {
  // weight_ih [4H, I], weight_hh [4H, H], of the type of the data
  void (*pack)(const CellShape&, const void* weight_ih, const void* weight_hh, void* packed);
  // 16-bit rows to [rows, columns]
  void (*widen)(core::DataType, const CellRows& from, int64_t rows, int64_t columns, float* to);
  // over unit blocks x row groups
  void (*forward)(const CellShape&, const CellForward&, int64_t begin, int64_t end);
  // grad_gates and grad_new_c, over rows
  void (*gate_gradients)(const CellShape&, const CellBackward&, int64_t begin, int64_t end);
  // grad_peephole, over unit blocks
  void (*peephole_gradients)(const CellShape&, const CellBackward&, int64_t begin, int64_t end);
  // grad_x and grad_new_h, over the panels that are wanted x row groups
  void (*input_gradients)(const CellShape&, const CellBackward&, int64_t begin, int64_t end);
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const CellKernels cell_kernels;)

}  // namespace deepops
