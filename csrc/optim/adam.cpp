// Adam over many tensors in one parallel region: the host side of the kernels, and the op `adam`.
#include "optim/adam.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <vector>

#include "core/checks.h"
#include "core/parallel.h"
#include "optim/plan.h"

namespace deepops {
namespace {

using core::DataType;
using optim::AdamHyper;
using optim::AdamScalars;
using optim::ChunkPlan;
using optim::Row;
using optim::StepCall;
using torch::stable::Tensor;

// Items below which no further thread is woken: about 30 us of work.
constexpr int64_t kGrain = 4;

// t: the step that is being taken, from 1. In double, as Python does it in torch's for-loop.
AdamScalars scalars(const AdamHyper& h, double t) {
  AdamScalars s;
  s.sign = h.maximize != 0 ? -1 : 1;
  s.param_decay = h.decoupled_weight_decay != 0 ? 1 - h.lr * h.weight_decay : 1;
  s.grad_decay = h.decoupled_weight_decay != 0 ? 0 : h.weight_decay;
  s.lerp_from_grad = 1 - h.beta1 >= 0.5;
  s.lerp_weight = s.lerp_from_grad ? (1 - h.beta1) - 1 : 1 - h.beta1;
  s.beta2 = h.beta2;
  s.one_minus_beta2 = 1 - h.beta2;
  s.bias2_sqrt = std::sqrt(1 - std::pow(h.beta2, t));
  s.eps = h.eps;
  s.minus_step_size = -(h.lr / (1 - std::pow(h.beta1, t)));
  return s;
}

// Advances the step counters and returns the scalars of every row. Rows of one group at the same step share the work
// of the two powers; in most models that is all of them.
std::vector<AdamScalars> advance(const Row* rows, int64_t count, const AdamHyper* hyper) {
  std::vector<AdamScalars> result(count);
  const Row* same = nullptr;
  for (int64_t i = 0; i < count; ++i) {
    const Row& row = rows[i];
    if (!row.active) continue;
    *row.step += 1;
    const bool known = same && same->group == row.group && *same->step == *row.step;
    result[i] = known ? result[same - rows] : scalars(hyper[row.group], *row.step);
    same = &row;
  }
  return result;
}

void step(const StepCall& call) {
  const Row* rows = call.rows;
  const ChunkPlan& plan = *call.plan;
  const auto* hyper = reinterpret_cast<const AdamHyper*>(call.hyper);
  const auto factors = advance(rows, call.row_count, hyper);
  const auto kernel = DEEPOPS_CHOOSE_ISA(adam_chunk);
  core::parallel_for(plan.items(), kGrain, [&](int64_t first, int64_t last) {
    plan.for_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      const Row& row = rows[i];
      const int64_t size = core::size_of(row.dtype);
      const auto at = [&](void* data) { return data ? static_cast<char*>(data) + begin * size : nullptr; };
      const bool amsgrad = hyper[row.group].amsgrad != 0;
      kernel({at(row.param), static_cast<const char*>(row.grad) + begin * size, at(row.state[0]), at(row.state[1]),
              amsgrad ? at(row.state[2]) : nullptr, end - begin, row.dtype},
             factors[i]);
    });
  });
}

// The op: for tracing and compiling, and for whoever has lists of tensors. deepops.optim.Adam comes in below.
void adam(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
          std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> max_exp_avg_sqs, std::vector<Tensor> state_steps,
          double lr, double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize,
          bool decoupled_weight_decay) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      state_steps.size() == count && max_exp_avg_sqs.size() == (amsgrad ? count : 0),
                  "adam: lists of different length");
  std::vector<Row> rows(count);
  std::vector<int64_t> sizes(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    const DataType dtype = core::data_type_of(p, "adam", "params");
    STD_TORCH_CHECK(optim::is_dense(p.dim(), p.sizes().data(), p.strides().data()), "adam: params[", i,
                    "] does not fill its memory");
    std::vector<Tensor> others = {grads[i], exp_avgs[i], exp_avg_sqs[i]};
    if (amsgrad) others.push_back(max_exp_avg_sqs[i]);
    for (const Tensor& t : others) {
      STD_TORCH_CHECK(t.scalar_type() == p.scalar_type() && t.numel() == p.numel(), "adam: tensor ", i,
                      ": the gradient and the states need the dtype and the shape of the parameter");
      for (int64_t d = 0; d < p.dim(); ++d) {
        STD_TORCH_CHECK(t.dim() == p.dim() && t.size(d) == p.size(d) && (p.size(d) == 1 || t.stride(d) == p.stride(d)),
                        "adam: tensor ", i, ": the gradient and the states need the strides of the parameter");
      }
    }
    STD_TORCH_CHECK(
        state_steps[i].numel() == 1 && core::data_type_of(state_steps[i], "adam", "state_steps") == DataType::f32,
        "adam: state_steps: expected one float32 each");
    rows[i] = {p.data_ptr(),
               grads[i].data_ptr(),
               {exp_avgs[i].data_ptr(), exp_avg_sqs[i].data_ptr(), amsgrad ? max_exp_avg_sqs[i].data_ptr() : nullptr},
               static_cast<float*>(state_steps[i].data_ptr()),
               p.numel(),
               0,
               dtype,
               true};
    sizes[i] = p.numel();
  }
  const double hyper[] = {
      lr, beta1, beta2, eps, weight_decay, double(amsgrad), double(maximize), double(decoupled_weight_decay)};
  const ChunkPlan plan(sizes, optim::kCpuChunk);
  step({rows.data(), static_cast<int64_t>(count), &plan, hyper});
}

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) { m.impl("adam", TORCH_BOX(&adam)); }

}  // namespace
}  // namespace deepops

void deepops_adam_step(const deepops::optim::StepCall* call) { deepops::step(*call); }
