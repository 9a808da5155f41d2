// Adam on the GPU: its step function and its op.
#include "core/gpu.cuh"
//
#include <torch/csrc/stable/library.h>

#include "optim/adam_math.h"
#include "optim/adam_op.h"
//
#include "optim/gpu_step.h"

namespace deepops::optim {

// With one more, some registers are spilled from compute capability 10 on.
template <>
inline constexpr int kUniformBlocks<Adam> = 4;
template <>
inline constexpr int kMixedBlocks<Adam> = 3;

// The powers of the betas are shared out: power() of adam_math.h, a leaf of its tree per lane.
template <>
class WarpGroup<Adam> {
 public:
  DEEPOPS_DEVICE explicit WarpGroup(const Adam::Group* group)
      : beta1_powers_(&group->beta1_powers[0]),
        beta2_powers_(&group->beta2_powers[0]),
        hyper_(load_record(&group->hyper)) {}
  DEEPOPS_DEVICE int states() const { return Adam::states(hyper_); }
  DEEPOPS_DEVICE Adam::Scalars scalars(float t, double grad_factor) const {
    return isa_gpu::Math<Adam>::scalars(hyper_, power(beta1_powers_, t), power(beta2_powers_, t), grad_factor);
  }

 private:
  DEEPOPS_DEVICE static double power(const double* powers, float t) {
    static_assert(Adam::Group::kPowers == gpu::kWarp);
    double v = isa_gpu::has_factor(isa_gpu::counter_bits(t), gpu::lane()) ? gpu::load(powers + gpu::lane()) : 1;
#pragma unroll
    for (int m = gpu::kWarp / 2; m > 0; m /= 2) v = v * gpu::shuffle_xor(v, m);
    return v;
  }

  const double *beta1_powers_, *beta2_powers_;
  Adam::Hyper hyper_;
};

}  // namespace deepops::optim

void deepops_adam_step_cuda(const deepops::optim::StepCall* call) {
  deepops::optim::GpuStep<deepops::optim::Adam>::run(*call);
}

namespace deepops {

DEEPOPS_GPU_LIBRARY_IMPL(m) { m.impl("adam", TORCH_BOX((&optim::adam_op<optim::GpuBackend, deepops_adam_step_cuda>))); }

}  // namespace deepops
