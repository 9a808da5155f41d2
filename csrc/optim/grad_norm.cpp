// The norm of all gradients on the CPU: one parallel region, sums in double, added up in the order of the tensors.
#include "optim/grad_norm.h"

#include <cmath>
#include <vector>

#include "core/parallel.h"
#include "optim/step_cpu.h"

namespace deepops {
namespace {

using optim::ChunkPlan;
using optim::GradNorm;
using optim::GradSquares;
using optim::Row;
using optim::StepCall;

void* grad_at(const Row& row, int64_t begin) { return static_cast<char*>(row.grad) + begin * core::size_of(row.dtype); }

void norm(const StepCall& call, GradNorm* out, GradSquares* row_norms) {
  const ChunkPlan& plan = *call.plan;
  std::vector<GradSquares> slots(plan.slots().back());
  const auto kernel = DEEPOPS_CHOOSE_ISA(grad_squares);
  core::parallel_for(plan.items(), optim::kCpuGrain, [&](int64_t first, int64_t last) {
    plan.for_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      const Row& row = call.rows[i];
      slots[plan.slot(i, begin)] = kernel(grad_at(row, begin), row.dtype, end - begin);
    });
  });
  GradSquares total = {};
  for (int64_t i = 0; i < call.row_count; ++i) {
    const GradSquares sum = optim::sum_of_row(plan, slots, i);
    if (row_norms) row_norms[i] = sum;
    total += sum;
  }
  const double scale = call.scaling.grad_scale ? double(*call.scaling.grad_scale) : 1;
  *out = {total.squares, total.non_finite, float(std::sqrt(total.squares) / scale), total.non_finite != 0 ? 1.f : 0.f};
}

void clip(const StepCall& call) {
  const double factor = isa_generic::clip_factor(call.scaling.norm->squares, 1, call.scaling.max_norm);
  if (factor == 1) return;
  const auto kernel = DEEPOPS_CHOOSE_ISA(grad_multiply);
  core::parallel_for(call.plan->items(), optim::kCpuGrain, [&](int64_t first, int64_t last) {
    call.plan->for_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      kernel(grad_at(call.rows[i], begin), call.rows[i].dtype, end - begin, factor);
    });
  });
}

}  // namespace
}  // namespace deepops

void deepops_grad_norm(const deepops::optim::StepCall* call, deepops::optim::GradNorm* norm,
                       deepops::optim::GradSquares* row_norms) {
  deepops::norm(*call, norm, row_norms);
}

void deepops_grad_clip(const deepops::optim::StepCall* call) { deepops::clip(*call); }
