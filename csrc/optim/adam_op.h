// What the host sides of Adam share (adam.cpp, adam_cuda.cu): powers of the betas, and the op `adam` down to raw
// pointers.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/checks.h"
#include "optim/adam.h"
#include "optim/plan.h"

namespace deepops::optim {

// The groups of a step. Their powers are computed anew only where a beta is another one than at the last call.
class AdamGroups {
 public:
  const std::vector<AdamGroup>& update(const StepCall& call) {
    const auto* hyper = reinterpret_cast<const AdamHyper*>(call.hyper);
    const auto count = static_cast<size_t>(call.group_count);
    const size_t known = std::min(count, groups_.size());
    groups_.resize(count);
    for (size_t g = 0; g < count; ++g) {
      const AdamHyper old = groups_[g].hyper;
      groups_[g].hyper = hyper[g];
      if (g >= known || old.beta1 != hyper[g].beta1) fill(groups_[g].beta1_powers, hyper[g].beta1);
      if (g >= known || old.beta2 != hyper[g].beta2) fill(groups_[g].beta2_powers, hyper[g].beta2);
    }
    return groups_;
  }

 private:
  static void fill(double (&powers)[AdamGroup::kPowers], double beta) {
    for (int k = 0; k < AdamGroup::kPowers; ++k) powers[k] = std::pow(beta, std::ldexp(1.0, k));
  }

  std::vector<AdamGroup> groups_;
};

inline bool any_active(const StepCall& call) {
  return std::any_of(call.rows, call.rows + call.row_count, [](const Row& row) { return row.active; });
}

// The op of one backend: for tracing and compiling, and for whoever has lists of tensors; deepops.optim.Adam calls the
// step function. Backend: kDevice, its name in messages; on_device(tensor); chunk(sizes), its items; step(call).
template <class Backend>
struct AdamOp {
  using Tensor = torch::stable::Tensor;

  static void run(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                  std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> state_steps,
                  double lr, double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
                  bool decoupled_weight_decay) {
    const size_t count = params.size();
    STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                        state_steps.size() == count && max_exp_avg_sqs.size() == (amsgrad ? count : 0),
                    "adam: lists of different length");
    if (count == 0) return;
    std::vector<Row> rows(count);
    std::vector<int64_t> sizes(count);
    const auto device = params[0].get_device_index();
    for (size_t i = 0; i < count; ++i) {
      std::vector<Tensor> others = {grads[i], exp_avgs[i], exp_avg_sqs[i]};
      if (amsgrad) others.push_back(max_exp_avg_sqs[i]);
      check(i, params[i], others, state_steps[i], device);
      Row& row = rows[i];
      row.param = params[i].data_ptr();
      row.grad = grads[i].data_ptr();
      for (size_t k = 1; k < others.size(); ++k) row.state[k - 1] = others[k].data_ptr();
      row.step = static_cast<float*>(state_steps[i].data_ptr());
      row.numel = sizes[i] = params[i].numel();
      row.dtype = core::data_type_of(params[i], "adam", "params");
      row.active = true;
    }
    check_steps(rows);
    const double hyper[] = {
        lr, beta1, beta2, eps, weight_decay, double(amsgrad), double(maximize), double(decoupled_weight_decay)};
    const ChunkPlan plan(sizes, Backend::chunk(sizes));
    Backend::step({rows.data(), static_cast<int64_t>(count), &plan, hyper, 1, device, nullptr});
  }

 private:
  static void check(size_t i, const Tensor& p, const std::vector<Tensor>& others, const Tensor& step, int32_t device) {
    const auto here = [&](const Tensor& t) { return Backend::on_device(t) && t.get_device_index() == device; };
    core::data_type_of(p, "adam", "params");
    STD_TORCH_CHECK(here(p) && here(step), "adam: tensor ", i, ": expected all tensors on one ", Backend::kDevice,
                    " device, step counters too");
    STD_TORCH_CHECK(is_dense(p.dim(), p.sizes().data(), p.strides().data()), "adam: params[", i,
                    "] does not fill its memory");
    for (const Tensor& t : others) {
      STD_TORCH_CHECK(here(t), "adam: tensor ", i, ": expected all tensors on one ", Backend::kDevice, " device");
      STD_TORCH_CHECK(t.scalar_type() == p.scalar_type() && t.numel() == p.numel(), "adam: tensor ", i,
                      ": the gradient and the states need the dtype and the shape of the parameter");
      for (int64_t d = 0; d < p.dim(); ++d) {
        STD_TORCH_CHECK(t.dim() == p.dim() && t.size(d) == p.size(d) && (p.size(d) == 1 || t.stride(d) == p.stride(d)),
                        "adam: tensor ", i, ": the gradient and the states need the strides of the parameter");
      }
    }
    STD_TORCH_CHECK(step.numel() == 1 && core::data_type_of(step, "adam", "state_steps") == core::DataType::f32,
                    "adam: state_steps: expected one float32 each");
  }

  // A counter of two tensors would have to advance twice, and tell each of them another step.
  static void check_steps(const std::vector<Row>& rows) {
    std::vector<const float*> steps;
    for (const Row& row : rows) steps.push_back(row.step);
    std::sort(steps.begin(), steps.end());
    STD_TORCH_CHECK(std::adjacent_find(steps.begin(), steps.end()) == steps.end(),
                    "adam: state_steps: two tensors have the same step counter");
  }
};

}  // namespace deepops::optim
