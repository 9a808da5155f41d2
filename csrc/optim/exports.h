// What the libraries export for `_C`. No std headers: kernels include this.
#pragma once

namespace deepops::optim {
struct StepCall;  // optim/step.h
}

// Exported for `_C` (table.cpp): by _ops.so and, with the ending _cuda, by the library of the GPU kernels.
//   deepops_<rule>_step   one step over all rows; advances the step counters: one parallel region, or one launch (and
//                         one more where some rows are mixed)
//   deepops_grad_norm     one pass over the gradients of all rows, into `norm`, which is on their device
//   deepops_grad_clip     multiplies the gradients by the clipping factor, unless it is 1
#define DEEPOPS_EXPORT extern "C" __attribute__((visibility("default")))
#define DEEPOPS_DECLARE_STEP(rule)                                                 \
  DEEPOPS_EXPORT void deepops_##rule##_step(const deepops::optim::StepCall* call); \
  DEEPOPS_EXPORT void deepops_##rule##_step_cuda(const deepops::optim::StepCall* call);
