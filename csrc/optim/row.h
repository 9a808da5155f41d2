// One tensor of an optimizer's step, as raw pointers. No std headers: kernels include this.
#pragma once
#include "core/dtype.h"

namespace deepops::optim {

// All tensors of a row are dense, of the same dtype and the same strides, so that they are walked as flat arrays;
// step counters are fp32, as torch keeps them.
struct alignas(16) Row {       // so that a GPU loads it 16 bytes at a time
  void* param = nullptr;       // [numel]
  const void* grad = nullptr;  // [numel]
  void* state[3] = {};         // [numel] each, in the optimizer's own order; null when it has fewer
  float* step = nullptr;       // []
  int64_t numel = 0;
  int32_t group = 0;  // its param group: which block of hyper-parameters
  core::DataType dtype = core::DataType::f32;
  bool active = false;  // false: no gradient this time, the row is left out
};

}  // namespace deepops::optim
