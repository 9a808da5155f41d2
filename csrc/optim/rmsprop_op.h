// The op `rmsprop` (rmsprop.cpp, rmsprop_cuda.cu).
#pragma once
#include "optim/list_op.h"
#include "optim/rmsprop.h"

namespace deepops::optim {

template <class Backend, StepFunction kStep>
void rmsprop_op(std::vector<torch::stable::Tensor> params, std::vector<torch::stable::Tensor> grads,
                std::vector<torch::stable::Tensor> square_avgs, std::vector<torch::stable::Tensor> grad_avgs,
                std::vector<torch::stable::Tensor> momentum_buffers, std::vector<torch::stable::Tensor> state_steps,
                double lr, double alpha, double eps, double weight_decay, double momentum, bool centered,
                bool maximize) {
  ListOp<Backend>::run(RmsProp::kName, kStep, params, grads,
                       {{square_avgs, true}, {grad_avgs, centered}, {momentum_buffers, momentum > 0}}, state_steps,
                       {lr, alpha, eps, weight_decay, momentum, double(centered), double(maximize)});
}

}  // namespace deepops::optim
