// SGD: what the host code (sgd.cpp) and the kernels (sgd_kernel_cpu.cpp, sgd_cuda.cu) say to each other.
#pragma once
#include "optim/exports.h"
#include "optim/rule.h"

namespace deepops::optim {

struct Sgd {
  static constexpr const char* kName = "sgd";
  enum State { kMomentumBuffer };
  static constexpr int kStateSets[] = {0, 1};

  struct Hyper {  // flags are 0 or 1
    double lr, momentum, dampening, weight_decay, nesterov, maximize;
  };

  struct alignas(16) Group {
    Hyper hyper;
  };

  struct Scalars {
    double grad_factor;  // negative: maximize
    double weight_decay, momentum, one_minus_dampening, minus_lr;
    bool decays, nesterov;
    bool first;  // the buffer has nothing yet
  };

  DEEPOPS_HD static int states(const Hyper& hyper) { return hyper.momentum != 0 ? 1 : 0; }

  static void fill(Group& group, const Hyper& hyper, bool) { group.hyper = hyper; }
};

}  // namespace deepops::optim

namespace deepops {
DEEPOPS_DECLARE_FOR_EACH_ISA(extern const optim::RuleKernels<optim::Sgd> sgd_kernels;)
}

DEEPOPS_DECLARE_STEP(sgd)
