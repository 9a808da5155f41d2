// RMSprop: what the host code (rmsprop.cpp) and the kernels (rmsprop_kernel_cpu.cpp, rmsprop_cuda.cu) say to each
// other.
#pragma once
#include "optim/exports.h"
#include "optim/rule.h"

namespace deepops::optim {

struct RmsProp {
  static constexpr const char* kName = "rmsprop";
  enum State { kSquareAvg, kGradAvg, kMomentumBuffer };
  static constexpr int kStateSets[] = {1, 3, 5, 7};

  struct Hyper {  // flags are 0 or 1
    double lr, alpha, eps, weight_decay, momentum, centered, maximize;
  };

  struct alignas(16) Group {
    Hyper hyper;
  };

  struct Scalars {
    double grad_factor;  // negative: maximize
    double weight_decay, alpha, one_minus_alpha;
    double lerp_weight;  // 1 - alpha, less 1 where lerp_from_grad
    double eps, momentum, minus_lr;
    bool decays;
    bool lerp_from_grad;  // 1 - alpha >= 1/2
  };

  DEEPOPS_HD static int states(const Hyper& hyper) {
    return 1 + (hyper.centered != 0 ? 2 : 0) + (hyper.momentum > 0 ? 4 : 0);
  }

  static void fill(Group& group, const Hyper& hyper, bool) { group.hyper = hyper; }
};

}  // namespace deepops::optim

namespace deepops {
DEEPOPS_DECLARE_FOR_EACH_ISA(extern const optim::RuleKernels<optim::RmsProp> rmsprop_kernels;)
}

DEEPOPS_DECLARE_STEP(rmsprop)
