// What the host sides of Adam share (adam.cpp, adam_cuda.cu): the op `adam`, and powers of the betas.
#pragma once
#include <cmath>

#include "optim/adam.h"
#include "optim/list_op.h"

namespace deepops::optim {

inline void Adam::fill(Group& group, const Hyper& hyper, bool known) {
  const auto powers = [](double (&out)[Group::kPowers], double beta) {
    for (int k = 0; k < Group::kPowers; ++k) out[k] = std::pow(beta, std::ldexp(1.0, k));
  };
  const Hyper old = group.hyper;
  group.hyper = hyper;
  if (!known || old.beta1 != hyper.beta1) powers(group.beta1_powers, hyper.beta1);
  if (!known || old.beta2 != hyper.beta2) powers(group.beta2_powers, hyper.beta2);
}

template <class Backend, StepFunction kStep>
void adam_op(std::vector<torch::stable::Tensor> params, std::vector<torch::stable::Tensor> grads,
             std::vector<torch::stable::Tensor> exp_avgs, std::vector<torch::stable::Tensor> exp_avg_sqs,
             std::vector<torch::stable::Tensor> max_exp_avg_sqs, std::vector<torch::stable::Tensor> state_steps,
             double lr, double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
             bool decoupled_weight_decay) {
  ListOp<Backend>::run(
      Adam::kName, kStep, params, grads, {{exp_avgs, true}, {exp_avg_sqs, true}, {max_exp_avg_sqs, amsgrad}},
      state_steps,
      {lr, beta1, beta2, eps, weight_decay, double(amsgrad), double(maximize), double(decoupled_weight_decay)});
}

}  // namespace deepops::optim
