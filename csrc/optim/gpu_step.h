// The step of any rule on the GPU: the host's side of step_cuda.cuh.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "optim/gpu_memory.h"
#include "optim/groups.h"
#include "optim/mixed_step_cuda.cuh"

namespace deepops::optim {

template <class Rule>
class GpuStep {
 public:
  static void run(const StepCall& call) {
    if (!any_active(call)) return;
    GpuCall gpu_call(call);
    GpuMemory& memory = gpu_call.memory();
    StepArguments<Rule> a = {};
    a.table = gpu_call.rows();
    a.groups = gpu_call.groups(groups_of(memory).update(call));
    a.arrived = gpu_call.template zeroed<unsigned>(memory.arrived, call.row_count);
    a.scaling = call.scaling;
    a.rounding = call.rounding;
    a.all_mixed = call.scaling.write_grads || call.facts;
    if (call.facts) {
      a.facts = call.facts;
      a.slots = gpu_call.template uninitialised<RowFacts>(memory.fact_slots, call.plan->slots().back());
      a.counted = gpu_call.template zeroed<unsigned>(memory.counted, call.row_count);
    }
    bool some_uniform = false, some_mixed = false;
    for (int64_t i = 0; i < call.row_count; ++i) {
      const Row& row = call.rows[i];
      a.some_empty |= call.plan->sizes()[i] == 0 && (row.active || call.facts);
      if (row.active) (is_mixed(call, row) ? some_mixed : some_uniform) = true;
    }
    const int64_t blocks = blocks_for(*call.plan, kStepThreads);
    if (some_uniform) gpu::launch(Rule::kName, step_kernel<Rule>, blocks, kStepThreads, gpu_call.stream(), a);
    if (some_mixed) {
      static const std::string name = Rule::kName + std::string(" mixed");
      gpu::launch(name.c_str(), mixed_step_kernel<Rule>, blocks, kStepThreads, gpu_call.stream(), a);
    }
  }

 private:
  struct GroupsMemory final : StepMemory {
    Groups<Rule> groups;
  };

  static Groups<Rule>& groups_of(GpuMemory& memory) {
    if (!memory.groups) memory.groups = std::make_unique<GroupsMemory>();
    return static_cast<GroupsMemory&>(*memory.groups).groups;
  }
};

}  // namespace deepops::optim
