// What one step of any optimizer is given, on any backend. Knows nothing of torch, Python or a particular optimizer.
#pragma once
#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "core/host_device.h"
#include "optim/plan.h"
#include "optim/row.h"
#include "optim/scaling.h"

namespace deepops::optim {

// What a step function keeps from one step to the next of the same table, e.g. its copy on the device.
struct StepMemory {
  virtual ~StepMemory() = default;
};

struct StepCall {
  const Row* rows;  // [row_count]
  int64_t row_count;
  const ChunkPlan* plan;  // over the rows; one that is not active has size 0 in it
  const double* hyper;    // one block per param group, laid out by the optimizer; zeros for a group that has no rows
  int64_t group_count;
  int32_t device_index;                 // of all tensors
  std::unique_ptr<StepMemory>* memory;  // null: nothing is kept; empty at the first step of a table
  Scaling scaling = {};
  Rounding rounding = {};
  RowFacts* facts = nullptr;  // [row_count], on the device; null: not wanted
};

inline bool any_active(const StepCall& call) {
  return std::any_of(call.rows, call.rows + call.row_count, [](const Row& row) { return row.active; });
}

// Whether gradients have memory in common, so that they cannot be written independently of one another. Each row's
// fills its memory.
inline bool grads_overlap(const Row* rows, int64_t row_count) {
  std::vector<std::pair<const char*, const char*>> spans;
  for (const Row* row = rows; row != rows + row_count; ++row) {
    const auto* begin = static_cast<const char*>(row->grad);
    if (row->active && row->numel > 0) spans.emplace_back(begin, begin + row->numel * core::size_of(row->dtype));
  }
  std::sort(spans.begin(), spans.end());
  return std::adjacent_find(spans.begin(), spans.end(),
                            [](const auto& one, const auto& next) { return next.first < one.second; }) != spans.end();
}

// Whether the row takes the kernel that converts what it loads and stores, instead of the one of a single dtype.
// all: every row does.
DEEPOPS_HD bool is_mixed(const Row& row, bool all, bool stochastic) {
  return all || row.state_dtype != row.dtype || row.master_kind != Master::none ||
         (stochastic && row.dtype == core::DataType::bf16);
}
inline bool is_mixed(const StepCall& call, const Row& row) {
  return is_mixed(row, call.scaling.write_grads || call.facts, call.rounding.stochastic);
}

}  // namespace deepops::optim
