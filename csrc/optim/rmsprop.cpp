// RMSprop on the CPU: its step function and its op.
#include "optim/rmsprop.h"

#include <torch/csrc/stable/library.h>

#include "optim/rmsprop_op.h"
#include "optim/step_cpu.h"

void deepops_rmsprop_step(const deepops::optim::StepCall* call) {
  using namespace deepops;
  optim::CpuStep<optim::RmsProp>::run(*call, *DEEPOPS_CHOOSE_ISA(rmsprop_kernels));
}

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("rmsprop", TORCH_BOX((&deepops::optim::rmsprop_op<deepops::optim::CpuBackend, deepops_rmsprop_step>)));
}
