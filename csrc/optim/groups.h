// The param groups of a step as its kernels want them.
#pragma once
#include <algorithm>
#include <vector>

#include "optim/step.h"

namespace deepops::optim {

// What a rule makes of a group's hyper-parameters is made anew only where they are others than at the last step.
template <class Rule>
class Groups {
 public:
  const std::vector<typename Rule::Group>& update(const StepCall& call) {
    const auto* hyper = reinterpret_cast<const typename Rule::Hyper*>(call.hyper);
    const auto count = static_cast<size_t>(call.group_count);
    const size_t known = std::min(count, groups_.size());
    groups_.resize(count);
    for (size_t g = 0; g < count; ++g) Rule::fill(groups_[g], hyper[g], g < known);
    return groups_;
  }

 private:
  std::vector<typename Rule::Group> groups_;
};

}  // namespace deepops::optim
