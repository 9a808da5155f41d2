// Argument checks of the ops, and small conversions from torch's types. The Python wrappers check first, with better
// words; these keep a direct call of torch.ops.deepops.* from crashing.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "core/dtype.h"

namespace deepops::core {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DataType data_type_of(const Tensor& tensor, const char* op, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DataType::f32;
    case ScalarType::Double:
      return DataType::f64;
    case ScalarType::Half:
      return DataType::f16;
    case ScalarType::BFloat16:
      return DataType::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float64, float16 or bfloat16");
      return DataType::f32;
  }
}

// The type of statistics and parameters beside data of this type.
inline ScalarType opmath_scalar_type(DataType type) {
  return type == DataType::f64 ? ScalarType::Double : ScalarType::Float;
}

inline const void* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

inline void check_cpu(const Tensor& tensor, const char* op, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, " must be a CPU tensor");
}

inline void check_same_device(const Tensor& tensor, const Tensor& x, const char* op, const char* name) {
  const bool same = tensor.is_cpu() == x.is_cpu() && tensor.is_cuda() == x.is_cuda() &&
                    (x.is_cpu() || tensor.get_device_index() == x.get_device_index());
  STD_TORCH_CHECK(same, op, ": ", name, " must be on the same device as x");
}

// As Python writes it; of the types that vectors of ops have.
inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return type == ScalarType::Short ? "int16" : "of another dtype";
  }
}

// A vector of `size` values of the given type on the device of x, or nothing.
inline void check_vector(const std::optional<Tensor>& tensor, int64_t size, ScalarType type, const Tensor& x,
                         const char* op, const char* name) {
  if (!tensor.has_value()) return;
  check_same_device(*tensor, x, op, name);
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size && tensor->is_contiguous(), op, ": ", name,
                  " must be [", size, "], contiguous");
  STD_TORCH_CHECK(tensor->scalar_type() == type, op, ": ", name, " must be ", dtype_name(type));
}

// Same device, sizes, strides and type as x, or nothing.
inline void check_same_layout(const std::optional<Tensor>& tensor, const Tensor& x, const char* op, const char* name) {
  if (!tensor.has_value()) return;
  check_same_device(*tensor, x, op, name);
  bool same = tensor->dim() == x.dim() && tensor->scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < x.dim(); ++d)
    same = tensor->size(d) == x.size(d) && (x.size(d) == 1 || tensor->stride(d) == x.stride(d));
  STD_TORCH_CHECK(same || x.numel() == 0, op, ": ", name, " must have the sizes, strides and dtype of x");
}

}  // namespace deepops::core
