// The op `sgd` (sgd.cpp, sgd_cuda.cu).
#pragma once
#include "optim/list_op.h"
#include "optim/sgd.h"

namespace deepops::optim {

template <class Backend, StepFunction kStep>
void sgd_op(std::vector<torch::stable::Tensor> params, std::vector<torch::stable::Tensor> grads,
            std::vector<torch::stable::Tensor> momentum_buffers, std::vector<torch::stable::Tensor> state_steps,
            double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  ListOp<Backend>::run(Sgd::kName, kStep, params, grads, {{momentum_buffers, momentum != 0}}, state_steps,
                       {lr, momentum, dampening, weight_decay, double(nesterov), double(maximize)});
}

}  // namespace deepops::optim
