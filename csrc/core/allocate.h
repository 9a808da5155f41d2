// New tensors by torch's C interface, about 0.3 us each: what torch::stable has are boxed ops that look themselves up.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "core/stable.h"

namespace deepops::core {

using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Uninitialised, dense with the given strides, of the dtype and on the device of `like`.
inline torch::stable::Tensor empty(Sizes sizes, Sizes strides, const torch::stable::Tensor& like) {
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), dtype,
                                                         device, like.get_device_index(), &made));
  return torch::stable::Tensor(made);
}

// The same with the sizes and strides of `like`, which is dense.
inline torch::stable::Tensor empty_like(const torch::stable::Tensor& like) {
  return empty(like.sizes(), like.strides(), like);
}

// Uninitialised, [size]. dtype and device_type: torch's own numbers.
inline torch::stable::Tensor empty_vector(int64_t size, int32_t dtype, int32_t device_type, int32_t device_index) {
  const int64_t stride = 1;
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &stride, dtype, device_type, device_index, &made));
  return torch::stable::Tensor(made);
}

// Uninitialised, [size], on the device of `like`.
inline torch::stable::Tensor empty_vector(int64_t size, torch::headeronly::ScalarType type,
                                          const torch::stable::Tensor& like) {
  int32_t device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  return empty_vector(size, dtype, device, like.get_device_index());
}

// Like `like`, or of nothing.
inline torch::stable::Tensor empty_like_if(bool wanted, const torch::stable::Tensor& like) {
  return wanted ? core::empty_like(like) : empty_vector(0, like.scalar_type(), like);
}

}  // namespace deepops::core
