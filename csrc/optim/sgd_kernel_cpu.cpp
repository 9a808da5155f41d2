// SGD on the CPU, compiled once per instruction set (cmake/CpuIsa.cmake).
#include "core/lanes.h"
#include "optim/sgd.h"
#include "optim/sgd_math.h"
#include "optim/step_kernel_cpu.h"

namespace deepops::DEEPOPS_ISA {

const optim::RuleKernels<optim::Sgd> sgd_kernels = make_kernels<optim::Sgd>();

}  // namespace deepops::DEEPOPS_ISA
