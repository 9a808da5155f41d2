// SGD on the CPU: its step function and its op.
#include "optim/sgd.h"

#include <torch/csrc/stable/library.h>

#include "optim/sgd_op.h"
#include "optim/step_cpu.h"

void deepops_sgd_step(const deepops::optim::StepCall* call) {
  using namespace deepops;
  optim::CpuStep<optim::Sgd>::run(*call, *DEEPOPS_CHOOSE_ISA(sgd_kernels));
}

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("sgd", TORCH_BOX((&deepops::optim::sgd_op<deepops::optim::CpuBackend, deepops_sgd_step>)));
}
