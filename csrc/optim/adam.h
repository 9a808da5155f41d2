// Adam over many tensors: what the host code (adam.cpp) and the kernels (adam_kernel_cpu.cpp) say to each other.
#pragma once
#include "core/cpu_isa.h"
#include "optim/row.h"

namespace deepops::optim {

struct StepCall;

// Hyper-parameters of one param group, in the order in which deepops/optim/adam.py hands them over; flags are 0 or 1.
struct AdamHyper {
  double lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay;
};

// ... and what a kernel needs of it: powers[k] = beta^(2^k), of which it makes beta^t by products alone (power() in
// adam_math.h), so that CPU and GPU have the same bits whatever their libraries' pow().
struct alignas(16) AdamGroup {
  static constexpr int kPowers = 32;
  AdamHyper hyper;
  double beta1_powers[kPowers], beta2_powers[kPowers];
};

// What is the same for all elements of a tensor in one step. Computed in double; a kernel for fp32 arithmetic rounds.
struct AdamScalars {
  double sign;         // -1: maximize
  double param_decay;  // 1 - lr * weight_decay where that is decoupled, else 1
  double grad_decay;   // weight_decay where it is L2, else 0
  double lerp_weight;  // 1 - beta1, less 1 where lerp_from_grad
  double beta2, one_minus_beta2;
  double bias2_sqrt;  // sqrt(1 - beta2^t)
  double eps;
  double minus_step_size;  // -lr / (1 - beta1^t)
  bool lerp_from_grad;     // 1 - beta1 >= 1/2
};

// n elements of one tensor. v_max: null without amsgrad.
struct AdamChunk {
  void* p;
  const void* g;
  void *m, *v, *v_max;
  int64_t n;
  core::DataType dtype;
};

}  // namespace deepops::optim

namespace deepops {
// t: the step that is being taken, from 1.
DEEPOPS_DECLARE_FOR_EACH_ISA(optim::AdamScalars adam_scalars(const optim::AdamGroup& group, float t);)
DEEPOPS_DECLARE_FOR_EACH_ISA(void adam_chunk(const optim::AdamChunk& chunk, const optim::AdamScalars& scalars);)
}  // namespace deepops

// One step over all rows; advances the step counters. Exported for `_C` (table.cpp): by _ops.so, in one parallel
// region, and by the library of the GPU kernels, in one launch.
extern "C" {
__attribute__((visibility("default"))) void deepops_adam_step(const deepops::optim::StepCall* call);
__attribute__((visibility("default"))) void deepops_adam_step_cuda(const deepops::optim::StepCall* call);
}
