// Host side of batch_norm_act on every device: what a call says, and whether its tensors fit together.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "batch_norm_act/batch_norm_act.h"
#include "core/allocate.h"
#include "core/checks.h"

namespace deepops {

using core::DataType;
using core::ScalarType;
using core::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr int64_t kExactBelow = 256;  // values per channel: roundings of single terms average out above

inline Activation activation_of(const std::string& name) {
  constexpr const char* kNames[] = {"identity", "relu", "leaky_relu", "relu6",
                                    "silu",     "gelu", "gelu_tanh",  "hardswish"};
  for (int i = 0; i < 8; ++i)
    if (name == kNames[i]) return static_cast<Activation>(i);
  STD_TORCH_CHECK(false, "batch_norm_act: activation '", name, "' is not known");
  return Activation::identity;
}

inline bool is_channels_last(const Tensor& x) {
  int64_t expected = x.size(1);
  if (x.size(1) != 1 && x.stride(1) != 1) return false;
  for (int64_t d = x.dim() - 1; d != 1; d = d == 2 ? 0 : d - 1) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
    if (d == 0) break;
  }
  return true;
}

// At most `samples` of them, spread over the values of a channel.
inline void place_samples(BatchNormActShape& p, int64_t samples) {
  const int64_t count = p.count();
  p.next_channel = p.channels_adjacent ? 1 : p.inner;
  p.samples = std::min({count, samples, int64_t(std::size(p.sample_offset))});
  for (int64_t i = 0; i < p.samples; ++i) {
    const int64_t at = i * count / p.samples, n = at / p.inner, l = at % p.inner;
    p.sample_offset[i] = p.channels_adjacent ? at * p.channels : n * p.channels * p.inner + l;
  }
}

inline BatchNormActShape shape_of(const Tensor& x, const std::string& activation, double negative_slope) {
  STD_TORCH_CHECK(x.dim() >= 2, "batch_norm_act: x must have at least 2 dimensions");
  BatchNormActShape p{};
  p.dtype = core::data_type_of(x, "batch_norm_act", "x");
  p.activation = activation_of(activation);
  p.negative_slope = negative_slope;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.inner = 1;
  for (int64_t d = 2; d < x.dim(); ++d) p.inner *= x.size(d);
  const bool contiguous = x.is_contiguous();
  STD_TORCH_CHECK(contiguous || (x.dim() > 2 && is_channels_last(x)), "batch_norm_act: x must be dense");
  p.channels_adjacent = !contiguous || p.inner == 1;
  p.exact = p.count() <= kExactBelow;
  if (x.numel() > 0) place_samples(p, std::size(p.sample_offset));
  return p;
}

// Two results with a number per channel each, in the type of statistics; empty if not wanted.
struct TwoVectors {
  TwoVectors(const BatchNormActShape& p, const Tensor& x, bool wanted = true)
      : first(core::empty_vector(wanted ? p.channels : 0, core::opmath_scalar_type(p.dtype), x)),
        second(core::empty_vector(wanted ? p.channels : 0, core::opmath_scalar_type(p.dtype), x)) {}
  void zero() {
    torch::stable::zero_(first);
    torch::stable::zero_(second);
  }
  Tensor first, second;
};

// ---- whether the tensors of a call fit together ---------------------------------------------------------------------

inline void check_affine(const BatchNormActShape& p, const Tensor& x, const OptionalTensor& weight,
                         const OptionalTensor& bias, const char* op) {
  const ScalarType type = core::opmath_scalar_type(p.dtype);
  core::check_vector(weight, p.channels, type, x, op, "weight");
  core::check_vector(bias, p.channels, type, x, op, "bias");
}

inline void check_statistics(const BatchNormActShape& p, const Tensor& x, const Tensor& mean, const Tensor& invstd,
                             const char* op) {
  const ScalarType type = core::opmath_scalar_type(p.dtype);
  core::check_vector(mean, p.channels, type, x, op, "mean");
  core::check_vector(invstd, p.channels, type, x, op, "invstd");
}

inline void check_running(const BatchNormActShape& p, const Tensor& x, const OptionalTensor& running_mean,
                          const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                          const char* op) {
  const ScalarType type = core::opmath_scalar_type(p.dtype);
  core::check_vector(running_mean, p.channels, type, x, op, "running_mean");
  core::check_vector(running_var, p.channels, type, x, op, "running_var");
  if (!num_batches_tracked.has_value()) return;
  core::check_same_device(*num_batches_tracked, x, op, "num_batches_tracked");
  STD_TORCH_CHECK(num_batches_tracked->scalar_type() == ScalarType::Long && num_batches_tracked->numel() == 1, op,
                  ": num_batches_tracked must be one int64");
}

inline void check_train(const BatchNormActShape& p, const Tensor& x, const OptionalTensor& residual,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& running_mean,
                        const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked) {
  constexpr const char* kOp = "batch_norm_act_train";
  core::check_same_layout(residual, x, kOp, "residual");
  check_affine(p, x, weight, bias, kOp);
  check_running(p, x, running_mean, running_var, num_batches_tracked, kOp);
  STD_TORCH_CHECK(p.count() > 1 || x.numel() == 0, kOp, ": more than one value per channel is needed");
}

inline void check_eval(const BatchNormActShape& p, const Tensor& x, const OptionalTensor& residual,
                       const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
                       const Tensor& invstd) {
  constexpr const char* kOp = "batch_norm_act_eval";
  core::check_same_layout(residual, x, kOp, "residual");
  check_affine(p, x, weight, bias, kOp);
  check_statistics(p, x, mean, invstd, kOp);
}

inline void check_backward(const BatchNormActShape& p, const Tensor& x, const Tensor& grad_y,
                           const OptionalTensor& kept, const OptionalTensor& weight, const OptionalTensor& bias,
                           const Tensor& mean, const Tensor& invstd, const char* op) {
  core::check_same_layout(grad_y, x, op, "grad_y");
  core::check_same_layout(kept, x, op, "kept");
  check_affine(p, x, weight, bias, op);
  check_statistics(p, x, mean, invstd, op);
}

inline void check_merge(const BatchNormActShape& p, const Tensor& x, const Tensor& gathered,
                        const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& num_batches_tracked) {
  constexpr const char* kOp = "batch_norm_act_merge";
  core::check_same_device(gathered, x, kOp, "gathered");
  STD_TORCH_CHECK(gathered.dim() == 2 && gathered.size(1) == 2 * p.channels + 1 && gathered.is_contiguous() &&
                      gathered.scalar_type() == ScalarType::Double,
                  kOp, ": gathered must be contiguous float64, [processes, 2 * channels + 1]");
  check_running(p, x, running_mean, running_var, num_batches_tracked, kOp);
}

inline void check_input_grad(const BatchNormActShape& p, const Tensor& x, const Tensor& grad_y,
                             const OptionalTensor& kept, const OptionalTensor& weight, const OptionalTensor& bias,
                             const Tensor& mean, const Tensor& invstd, const Tensor& sums, const Tensor& count) {
  constexpr const char* kOp = "batch_norm_act_input_grad";
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd, kOp);
  core::check_vector(sums, 2 * p.channels, ScalarType::Double, x, kOp, "sums");
  core::check_vector(count, 1, ScalarType::Double, x, kOp, "count");
}

}  // namespace deepops
