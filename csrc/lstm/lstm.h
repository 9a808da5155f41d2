// lstm_sequence and its backward: types and kernel declarations. deepops/reference/lstm.py has the formulas.
//
// On the CPU a thread takes some of the sequences through all steps: rows of a batch never meet, so nobody waits. In a
// step the product h W_hh^T comes panel by panel (packed_product.h); the sums of a tile of rows and 16 units still lie
// in the first-level cache when the gates are computed from them. "sums": the type of sums, float, or double for f64.
#pragma once
#include <cstdint>

#include "core/cpu_isa.h"
#include "core/dtype.h"

namespace deepops {

// The variants of one step. What is not set costs nothing.
struct LstmFormula {
  bool peephole, clips;
  bool random;  // a seed was given: zoneout and dropout draw; else zoneout takes expectations
  bool drops;   // recurrent dropout, in training
  double cell_clip, zoneout_h, zoneout_c, recurrent_dropout;
};

// What a call says, whatever device it is for (host.h).
struct LstmShape : LstmFormula {
  core::DataType dtype;
  int64_t steps, batch, hidden, state;  // T, B, H, R: state is the size of h, projected or not
  bool projects, normalizes, masks_hidden, has_lengths;
  bool reverse;
  double layer_norm_eps;
  int64_t first_step;  // the number of step 0

  DEEPOPS_HD int64_t gates() const { return 4 * hidden; }
  // Which step is taken n-th.
  DEEPOPS_HD int64_t step(int64_t n) const { return reverse ? steps - 1 - n : n; }

  // Sequences that add up the gradients of the small weights together: by shape alone, so that threads, which take
  // whole groups, do not change the sums.
  int64_t rows_per_group() const { return (batch + kMostGroups - 1) / kMostGroups; }
  int64_t groups() const { return batch == 0 ? 0 : (batch + rows_per_group() - 1) / rows_per_group(); }
  // Rows of memory in sums are whole lanes.
  int64_t hidden_stride() const { return whole_lanes(hidden); }
  int64_t state_stride() const { return whole_lanes(state); }

  static constexpr int64_t kMostGroups = 32;
  static int64_t whole_lanes(int64_t size) { return (size + 15) / 16 * 16; }
};

// The weights as the kernels read them, all in sums.
struct LstmWeights {
  void* gates;       // forward: weight_hh, [unit blocks][R][4][16]; backward: [panels of R][4H][64]
  void* projection;  // weight_hr, forward: [panels of P][H][64]; backward: [panels of H][P][64]
  void* peephole;    // [3][hidden_stride]
  void* ln_hh;       // [4][hidden_stride]
  void *ln_c, *bias_ln_c;
};

// As the caller gives them, in the type of the data; null where there is none.
struct LstmRawWeights {
  const void *hh, *hr, *peephole, *ln_hh, *ln_c, *bias_ln_c;
};

// What both directions are given.
struct LstmInputs {
  LstmWeights weights;
  const void* c0;           // [B, H]
  const void* hidden_mask;  // [B, R], or null
  const int64_t* lengths;   // [B], or null
  uint64_t seed;
};

// Memory of its own, in sums, per sequence; strides are those of the shape.
struct LstmForward : LstmInputs {
  const void* gates_x;  // [T, B, 4H], sums
  const void* h0;       // [B, R]
  // Results; null where they are not wanted.
  void *h, *c, *h_n, *c_n, *gates, *out, *r;
  void* stats;      // sums
  void* operand;    // [2][B][state]: what the product reads, and what the next one will
  void* h_state;    // [B][state]: h where the operand is masked
  void* c_state;    // [B][hidden]
  void* row_out;    // [B][hidden]: with layer norm or a projection: o * tanh(.)
  void* row_cell;   // [B][hidden]: with layer norm
  void* row_gates;  // [B][unit blocks][4][16]: with layer norm
};

struct LstmBackward : LstmInputs {
  const void *grad_h, *grad_c;      // [T, B, ..], or null
  const void *grad_h_n, *grad_c_n;  // [B, ..], or null
  const void *gates, *c, *r;
  const void* stats;                     // sums
  void *grad_gates, *grad_r, *grad_out;  // sums
  void *grad_h0, *grad_c0;               // [B, ..]
  void* grad_state;                      // [B][state]: of h
  void* grad_cell;                       // [B][hidden]: of c
  void* row_out;                         // [B][hidden]: of o * tanh(.)
  void *row_o, *row_shown;               // [B][hidden]: with layer norm: of the sum of o, of the normalised cell
  double* small;                         // [groups][small_size()]: gradients of the small weights
};

// Where the gradients of the small weights lie in what a group adds up. (Inlined, else each instruction set would have
// a copy of its own, of which the linker keeps one for all.)
struct LstmSmall {
  int64_t peephole, ln_hh, ln_c, bias_ln_c, size;
  [[gnu::always_inline]] explicit LstmSmall(const LstmShape& p) {
    const int64_t stride = p.hidden_stride();
    peephole = 0;
    ln_hh = peephole + (p.peephole ? 3 * stride : 0);
    ln_c = ln_hh + (p.normalizes ? 4 * stride : 0);
    bias_ln_c = ln_c + (p.normalizes ? stride : 0);
    size = bias_ln_c + (p.normalizes ? stride : 0);
  }
};

struct LstmKernels {
  void (*pack_forward)(const LstmShape&, const LstmRawWeights&, const LstmWeights&);
  void (*pack_backward)(const LstmShape&, const LstmRawWeights&, const LstmWeights&);
  // All steps of the sequences [begin, end).
  void (*forward)(const LstmShape&, const LstmForward&, int64_t begin, int64_t end);
  // Of groups [begin, end).
  void (*backward)(const LstmShape&, const LstmBackward&, int64_t begin, int64_t end);
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const LstmKernels lstm_kernels;)

}  // namespace deepops
