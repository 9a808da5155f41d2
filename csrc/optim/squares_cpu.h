// Sums of squares for CPU kernels.
#pragma once
#include "core/lanes.h"
#include "optim/grad_norm.h"

namespace deepops::DEEPOPS_ISA {

// Each of 16 lanes is a sum in double, where products of fp32 numbers are exact: always in the same order.
class SquaresInLanes {
 public:
  void add(const Lanes<double>& x) {
    squares_ += x * x;
    non_finite_ += select((x - x) >= Lanes<double>(0.0), Lanes<double>(0.0), Lanes<double>(1.0));
  }
  optim::GradSquares sum() const { return {sum_of_lanes(squares_), sum_of_lanes(non_finite_)}; }

 private:
  Lanes<double> squares_ = 0.0, non_finite_ = 0.0;
};

}  // namespace deepops::DEEPOPS_ISA
