// The norm of all gradients together, and their clipping: what host code, kernels and `_C` say to each other.
#pragma once
#include "core/cpu_isa.h"
#include "core/dtype.h"
#include "optim/exports.h"
#include "optim/scaling.h"

namespace deepops::optim {

// A part of a sum of squares.
struct GradSquares {
  double squares, non_finite;

  GradSquares& operator+=(const GradSquares& part) {
    squares += part.squares;
    non_finite += part.non_finite;
    return *this;
  }
};

}  // namespace deepops::optim

namespace deepops {
// Of n elements; in double and always in the same order.
DEEPOPS_DECLARE_FOR_EACH_ISA(optim::GradSquares grad_squares(const void* grad, core::DataType dtype, int64_t n);)
// grad <- grad * factor
DEEPOPS_DECLARE_FOR_EACH_ISA(void grad_multiply(void* grad, core::DataType dtype, int64_t n, double factor);)
}  // namespace deepops

// Of the call only the rows' gradients, the plan, the memory and scaling.grad_scale are read. norm, row_norms: on the
// rows' device. row_norms: [row_count], null: not wanted.
DEEPOPS_EXPORT void deepops_grad_norm(const deepops::optim::StepCall* call, deepops::optim::GradNorm* norm,
                                      deepops::optim::GradSquares* row_norms);
DEEPOPS_EXPORT void deepops_grad_norm_cuda(const deepops::optim::StepCall* call, deepops::optim::GradNorm* norm,
                                           deepops::optim::GradSquares* row_norms);
// Multiplies the gradients by the clipping factor of scaling.max_norm and scaling.norm; touches none if it is 1.
DEEPOPS_EXPORT void deepops_grad_clip(const deepops::optim::StepCall* call);
DEEPOPS_EXPORT void deepops_grad_clip_cuda(const deepops::optim::StepCall* call);
