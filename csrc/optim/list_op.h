// The op of a rule on lists of tensors (library.cpp), down to a StepCall: for tracing and compiling, and for whoever
// has lists; the classes of deepops.optim call the step functions themselves.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "core/checks.h"
#include "optim/plan.h"
#include "optim/step.h"

namespace deepops::optim {

using StepFunction = void (*)(const StepCall*);

// Backend: kDevice, its name in messages; on_device(tensor); chunk(sizes), elements per work item.
template <class Backend>
class ListOp {
 public:
  using Tensor = torch::stable::Tensor;
  using Tensors = std::vector<Tensor>;

  struct State {
    const Tensors& tensors;
    bool used;  // false: the list is to be empty
  };

  // states: in the order of the rule. hyper: Rule::Hyper.
  static void run(const char* op, StepFunction step, const Tensors& params, const Tensors& grads,
                  std::initializer_list<State> states, const Tensors& state_steps,
                  std::initializer_list<double> hyper) {
    const size_t count = params.size();
    bool same_length = grads.size() == count && state_steps.size() == count;
    for (const State& state : states) same_length &= state.tensors.size() == (state.used ? count : 0);
    STD_TORCH_CHECK(same_length, op, ": lists of different length");
    if (count == 0) return;
    std::vector<Row> rows(count);
    std::vector<int64_t> sizes(count);
    const auto device = params[0].get_device_index();
    for (size_t i = 0; i < count; ++i) {
      const Tensor& p = params[i];
      check_param(op, i, p, state_steps[i], device);
      check_like(op, i, grads[i], p, device);
      Row& row = rows[i];
      row.param = p.data_ptr();
      row.grad = grads[i].data_ptr();
      int k = 0;
      for (const State& state : states) {
        if (state.used) {
          check_like(op, i, state.tensors[i], p, device);
          row.state[k] = state.tensors[i].data_ptr();
        }
        ++k;
      }
      row.step = static_cast<float*>(state_steps[i].data_ptr());
      row.numel = sizes[i] = p.numel();
      row.number = static_cast<int32_t>(i);
      row.dtype = row.state_dtype = core::data_type_of(p, op, "params");
      row.active = true;
    }
    check_steps(op, rows);
    const ChunkPlan plan(sizes, Backend::chunk(sizes));
    const StepCall call = {rows.data(), static_cast<int64_t>(count), &plan, hyper.begin(), 1, device, nullptr};
    step(&call);
  }

 private:
  static bool here(const Tensor& t, int32_t device) { return Backend::on_device(t) && t.get_device_index() == device; }

  static void check_param(const char* op, size_t i, const Tensor& p, const Tensor& step, int32_t device) {
    core::data_type_of(p, op, "params");
    STD_TORCH_CHECK(here(p, device) && here(step, device), op, ": tensor ", i, ": expected all tensors on one ",
                    Backend::kDevice, " device, step counters too");
    STD_TORCH_CHECK(is_dense(p.dim(), p.sizes().data(), p.strides().data()), op, ": params[", i,
                    "] does not fill its memory");
    STD_TORCH_CHECK(step.numel() == 1 && core::data_type_of(step, op, "state_steps") == core::DataType::f32, op,
                    ": state_steps: expected one float32 each");
  }

  static void check_like(const char* op, size_t i, const Tensor& t, const Tensor& p, int32_t device) {
    STD_TORCH_CHECK(here(t, device), op, ": tensor ", i, ": expected all tensors on one ", Backend::kDevice, " device");
    STD_TORCH_CHECK(t.scalar_type() == p.scalar_type() && t.numel() == p.numel(), op, ": tensor ", i,
                    ": the gradient and the states need the dtype and the shape of the parameter");
    for (int64_t d = 0; d < p.dim(); ++d) {
      STD_TORCH_CHECK(t.dim() == p.dim() && t.size(d) == p.size(d) && (p.size(d) == 1 || t.stride(d) == p.stride(d)),
                      op, ": tensor ", i, ": the gradient and the states need the strides of the parameter");
    }
  }

  // A counter of two tensors would have to advance twice, and tell each of them another step.
  static void check_steps(const char* op, const std::vector<Row>& rows) {
    std::vector<const float*> steps;
    for (const Row& row : rows) steps.push_back(row.step);
    std::sort(steps.begin(), steps.end());
    STD_TORCH_CHECK(std::adjacent_find(steps.begin(), steps.end()) == steps.end(), op,
                    ": state_steps: two tensors have the same step counter");
  }
};

}  // namespace deepops::optim
