// lstm_sequence and its backward: types and kernel declarations of this folder. deepops/reference/lstm.py has the
// formulas.
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
};

}  // namespace deepops
