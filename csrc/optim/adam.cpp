// Adam on the CPU, over many tensors in one parallel region: the host side of the kernels.
#include "optim/adam.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "core/parallel.h"
#include "optim/adam_op.h"
#include "optim/plan.h"

namespace deepops {
namespace {

using optim::AdamGroup;
using optim::AdamGroups;
using optim::AdamScalars;
using optim::ChunkPlan;
using optim::Row;
using optim::StepCall;
using optim::StepMemory;
using torch::stable::Tensor;

// Items below which no further thread is woken: about 30 us of work.
constexpr int64_t kGrain = 4;

// Advances the step counters and returns the scalars of every row. Rows of one group at the same step share the work
// of the two powers; in most models that is all of them.
std::vector<AdamScalars> advance(const StepCall& call, const std::vector<AdamGroup>& groups) {
  const auto scalars = DEEPOPS_CHOOSE_ISA(adam_scalars);
  std::vector<AdamScalars> result(call.row_count);
  const Row* same = nullptr;
  for (int64_t i = 0; i < call.row_count; ++i) {
    const Row& row = call.rows[i];
    if (!row.active) continue;
    *row.step += 1;
    const bool known = same && same->group == row.group && *same->step == *row.step;
    result[i] = known ? result[same - call.rows] : scalars(groups[row.group], *row.step);
    same = &row;
  }
  return result;
}

struct CpuMemory final : StepMemory {
  AdamGroups groups;
};

void step(const StepCall& call) {
  if (!optim::any_active(call)) return;
  CpuMemory once;
  if (call.memory && !*call.memory) *call.memory = std::make_unique<CpuMemory>();
  auto& memory = call.memory ? static_cast<CpuMemory&>(**call.memory) : once;
  const std::vector<AdamGroup>& groups = memory.groups.update(call);
  const auto factors = advance(call, groups);
  const ChunkPlan& plan = *call.plan;
  const auto kernel = DEEPOPS_CHOOSE_ISA(adam_chunk);
  core::parallel_for(plan.items(), kGrain, [&](int64_t first, int64_t last) {
    plan.for_each(first, last, [&](int64_t i, int64_t begin, int64_t end) {
      const Row& row = call.rows[i];
      const int64_t size = core::size_of(row.dtype);
      const auto at = [&](void* data) { return data ? static_cast<char*>(data) + begin * size : nullptr; };
      const bool amsgrad = groups[row.group].hyper.amsgrad != 0;
      kernel({at(row.param), static_cast<const char*>(row.grad) + begin * size, at(row.state[0]), at(row.state[1]),
              amsgrad ? at(row.state[2]) : nullptr, end - begin, row.dtype},
             factors[i]);
    });
  });
}

struct Cpu {
  static constexpr const char* kDevice = "CPU";
  static bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }
  static int64_t chunk(const std::vector<int64_t>&) { return optim::kCpuChunk; }
  static void step(const StepCall& call) { deepops::step(call); }
};

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) { m.impl("adam", TORCH_BOX(&optim::AdamOp<Cpu>::run)); }

}  // namespace
}  // namespace deepops

void deepops_adam_step(const deepops::optim::StepCall* call) { deepops::step(*call); }
