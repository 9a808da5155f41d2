// What a step is told of the scaling and clipping of its gradients and of its rounding, and what it can tell.
#pragma once
#include <cstdint>

namespace deepops::optim {

// What a pass over all gradients finds, as they are (still scaled, where a loss is).
struct GradNorm {
  double squares;     // sum of g^2
  double non_finite;  // how many are not finite
  float norm;         // sqrt(squares) / grad_scale
  float found_inf;    // 1 if non_finite, else 0: what torch.amp.GradScaler.update() reads
};

// Pointers: on the device of the rows; null: none.
struct Scaling {
  const float* grad_scale;  // []: the gradients are this times too large
  const float* found_inf;   // []: take no step unless it is 0
  const GradNorm* norm;     // of the same gradients
  double max_norm;          // clip to it, of which `norm` is read; 0: do not
  bool skip_non_finite;     // take no step where `norm` has found some
  bool write_grads;         // leave the gradients as they were used, as torch's fused optimizers do; none overlap
};

struct Rounding {
  bool stochastic;  // of bf16
  uint64_t seed;
};

// What a step can tell of one row.
struct RowFacts {
  double grad_squares;                   // of the gradient as it came
  double non_finite;                     // elements of it
  double param_squares, update_squares;  // after the step; of the difference it made

  RowFacts& operator+=(const RowFacts& part) {
    grad_squares += part.grad_squares;
    non_finite += part.non_finite;
    param_squares += part.param_squares;
    update_squares += part.update_squares;
    return *this;
  }
};

}  // namespace deepops::optim
