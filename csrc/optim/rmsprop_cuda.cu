// RMSprop on the GPU: its step function and its op.
#include "core/gpu.cuh"
//
#include <torch/csrc/stable/library.h>

#include "optim/rmsprop_math.h"
#include "optim/rmsprop_op.h"
//
#include "optim/gpu_step.h"

namespace deepops::optim {

// With one more, some registers are spilled on compute capability 12.
template <>
inline constexpr int kMixedBlocks<RmsProp> = 3;

}  // namespace deepops::optim

void deepops_rmsprop_step_cuda(const deepops::optim::StepCall* call) {
  deepops::optim::GpuStep<deepops::optim::RmsProp>::run(*call);
}

namespace deepops {

DEEPOPS_GPU_LIBRARY_IMPL(m) {
  m.impl("rmsprop", TORCH_BOX((&optim::rmsprop_op<optim::GpuBackend, deepops_rmsprop_step_cuda>)));
}

}  // namespace deepops
