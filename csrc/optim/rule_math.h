// What the formulas of several optimizers have in common.
#pragma once
#include "core/math.h"

namespace deepops::DEEPOPS_ISA {

DEEPOPS_HD float square_root(float x) { return DEEPOPS_LIBM(sqrtf)(x); }
DEEPOPS_HD double square_root(double x) { return DEEPOPS_LIBM(sqrt)(x); }

// lerp(a, b, w) as ATen has it: a + w (b - a) for w < 1/2, else b + (w - 1) (b - a), exact at both ends.
// weight: w, or w - 1 where from_b.
template <class V, class T>
DEEPOPS_HD V lerp(const V& a, const V& b, T weight, bool from_b) {
  return (from_b ? b : a) + weight * (b - a);
}

}  // namespace deepops::DEEPOPS_ISA
