// SGD on the GPU: its step function and its op.
#include "core/gpu.cuh"
//
#include <torch/csrc/stable/library.h>

#include "optim/sgd_math.h"
#include "optim/sgd_op.h"
//
#include "optim/gpu_step.h"

void deepops_sgd_step_cuda(const deepops::optim::StepCall* call) {
  deepops::optim::GpuStep<deepops::optim::Sgd>::run(*call);
}

namespace deepops {

DEEPOPS_GPU_LIBRARY_IMPL(m) { m.impl("sgd", TORCH_BOX((&optim::sgd_op<optim::GpuBackend, deepops_sgd_step_cuda>))); }

}  // namespace deepops
