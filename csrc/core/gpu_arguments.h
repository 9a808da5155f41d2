// What host code gives to GPU kernels of ops: data of tensors that may be missing, sizes of grids.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace deepops::isa_gpu {

inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to; }  // division, rounded up

// Null for a missing tensor.
template <class A>
const A* input(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const A*>(tensor->const_data_ptr()) : nullptr;
}
template <class A>
A* output(const std::optional<torch::stable::Tensor>& tensor) {
  return tensor.has_value() ? static_cast<A*>(tensor->mutable_data_ptr()) : nullptr;
}

}  // namespace deepops::isa_gpu
