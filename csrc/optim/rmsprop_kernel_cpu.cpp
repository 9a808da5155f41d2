// RMSprop on the CPU, compiled once per instruction set (cmake/CpuIsa.cmake).
#include "core/lanes.h"
#include "optim/rmsprop.h"
#include "optim/rmsprop_math.h"
#include "optim/step_kernel_cpu.h"

namespace deepops::DEEPOPS_ISA {

const optim::RuleKernels<optim::RmsProp> rmsprop_kernels = make_kernels<optim::RmsProp>();

}  // namespace deepops::DEEPOPS_ISA
