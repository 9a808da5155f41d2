// Adam on the CPU: its step function and its op.
#include "optim/adam.h"

#include <torch/csrc/stable/library.h>

#include "optim/adam_op.h"
#include "optim/step_cpu.h"

void deepops_adam_step(const deepops::optim::StepCall* call) {
  using namespace deepops;
  optim::CpuStep<optim::Adam>::run(*call, *DEEPOPS_CHOOSE_ISA(adam_kernels));
}

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("adam", TORCH_BOX((&deepops::optim::adam_op<deepops::optim::CpuBackend, deepops_adam_step>)));
}
