// One tensor of an optimizer's step, as raw pointers. No std headers: kernels include this.
#pragma once
#include "core/dtype.h"

namespace deepops::optim {

// How a parameter of 16 bits is kept in single precision.
enum class Master : int32_t {
  none,
  full,      // in a tensor of its own, of which the parameter is a rounded copy
  low_half,  // bf16: the parameter is the upper half, rounded, and a tensor of 16-bit integers has the lower one
};

// Of an element of the master tensor, in bytes.
DEEPOPS_HD int64_t size_of(Master kind) { return kind == Master::full ? 4 : 2; }

// All tensors of a row are dense and of the same strides, so that they are walked as flat arrays. A complex tensor is
// one of real numbers, twice as many. Step counters are fp32, as torch keeps them.
struct alignas(16) Row {  // so that a GPU loads it 16 bytes at a time
  static constexpr int kStates = 3;
  void* grad = nullptr;       // [numel]; written only where Scaling::write_grads says so
  int64_t numel = 0;          // beside grad: the pass over the gradients loads the two at once, and no more of a row
  void* param = nullptr;      // [numel]
  void* state[kStates] = {};  // [numel] each, of state_dtype, in the optimizer's own order; null where it has none
  void* master = nullptr;     // [numel]; see Master
  float* step = nullptr;      // []
  int32_t group = 0;          // its param group: which block of hyper-parameters
  int32_t number = 0;         // of the parameter, over all groups: what it draws random numbers by
  core::DataType dtype = core::DataType::f32;
  core::DataType state_dtype = core::DataType::f32;
  Master master_kind = Master::none;
  bool active = false;  // false: no gradient this time, the row is left out
};

}  // namespace deepops::optim
