// Adam and AdamW: what the host code (adam.cpp) and the kernels (adam_kernel_cpu.cpp, adam_cuda.cu) say to each other.
#pragma once
#include "optim/exports.h"
#include "optim/rule.h"

namespace deepops::optim {

struct Adam {
  static constexpr const char* kName = "adam";
  enum State { kExpAvg, kExpAvgSq, kMaxExpAvgSq };
  static constexpr int kStateSets[] = {3, 7};

  struct Hyper {  // flags are 0 or 1
    double lr, beta1, beta2, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay;
  };

  // powers[k] = beta^(2^k), of which a kernel makes beta^t by products alone (power() in adam_math.h), so that CPU and
  // GPU have the same bits whatever their libraries' pow().
  struct alignas(16) Group {
    static constexpr int kPowers = 32;
    Hyper hyper;
    double beta1_powers[kPowers], beta2_powers[kPowers];
  };

  struct Scalars {
    double grad_factor;  // negative: maximize
    double param_decay;  // 1 - lr * weight_decay where that is decoupled, else 1
    double grad_decay;   // weight_decay where it is L2, else 0
    double lerp_weight;  // 1 - beta1, less 1 where lerp_from_grad
    double beta2, one_minus_beta2;
    double bias2_sqrt;  // sqrt(1 - beta2^t)
    double eps;
    double minus_step_size;  // -lr / (1 - beta1^t)
    bool lerp_from_grad;     // 1 - beta1 >= 1/2
  };

  DEEPOPS_HD static int states(const Hyper& hyper) { return hyper.amsgrad != 0 ? 7 : 3; }

  static void fill(Group& group, const Hyper& hyper, bool known);
};

}  // namespace deepops::optim

namespace deepops {
DEEPOPS_DECLARE_FOR_EACH_ISA(extern const optim::RuleKernels<optim::Adam> adam_kernels;)
}

DEEPOPS_DECLARE_STEP(adam)
