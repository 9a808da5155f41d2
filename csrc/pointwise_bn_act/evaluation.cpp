// pointwise_bn_act_eval on the CPU: checks, allocation, threads, registration.
#include "pointwise_bn_act/evaluation.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "batch_norm_act/host.h"
#include "core/memory_pool.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace deepops {
namespace {

using core::Scratch;

constexpr int64_t kStreamAbove = 16 << 20;  // bytes of y that do not stay in the cache anyway
constexpr int64_t kVectorBytes = 64, kLanes = 16;

const PointwiseEvaluationKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(pointwise_evaluation_kernels); }

void check_weight(const Tensor& weight, const char* op) {
  core::check_cpu(weight, op, "conv_weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 1 && weight.size(3) == 1 && weight.numel() > 0 &&
                      weight.is_contiguous() && core::data_type_of(weight, op, "conv_weight") <= DataType::f64,
                  op, ": conv_weight must be [K, C, 1, 1], contiguous, float32 or float64");
}

// What a call says of weights alone.
PointwiseEvaluation of_weight(const Tensor& weight, const char* op) {
  check_weight(weight, op);
  PointwiseEvaluation p{};
  p.dtype = core::data_type_of(weight, op, "conv_weight");
  p.channels = weight.size(0);
  p.inputs = weight.size(1);
  return p;
}

int64_t packed_size(const PointwiseEvaluation& p) { return panels_of(p.channels) * p.inputs * kPanelColumns; }

Tensor pack_cpu(Tensor conv_weight) {
  const PointwiseEvaluation p = of_weight(conv_weight, "pointwise_bn_act_pack");
  Tensor packed = core::empty_vector(packed_size(p), conv_weight.scalar_type(), conv_weight);
  const void* const from = conv_weight.const_data_ptr();
  void* const to = packed.mutable_data_ptr();
  const int64_t panels = panels_of(p.channels);
  // Packing costs as much as a few dozen multiply-adds of each value.
  core::divide(core::workers_for(64 * p.inputs * p.channels, core::kMultiplyAddsPerThread, panels), panels,
               [&](int64_t, int64_t begin, int64_t end) { kernels().pack(p, from, to, begin, end); });
  return packed;
}

// [N, K, out_height, out_width] in the layout of x.
struct OutputLayout {
  int64_t sizes[4], strides[4];
  explicit OutputLayout(const PointwiseEvaluation& p)
      : sizes{p.batch, p.channels, p.out_height, p.out_width},
        strides{p.pixels() * p.channels, p.channels_adjacent ? 1 : p.pixels(),
                p.out_width * (p.channels_adjacent ? p.channels : 1), p.channels_adjacent ? p.channels : 1} {}
};

Tensor evaluate_cpu(Tensor x, Tensor conv_weight, OptionalTensor packed, Tensor bias, OptionalTensor residual,
                    std::vector<int64_t> stride, std::string activation, double negative_slope) {
  constexpr const char* kOp = "pointwise_bn_act_eval";
  PointwiseEvaluation p = of_weight(conv_weight, kOp);
  core::check_cpu(x, kOp, "x");
  STD_TORCH_CHECK(
      x.dim() == 4 && x.numel() > 0 && x.size(1) == p.inputs && x.scalar_type() == conv_weight.scalar_type(), kOp,
      ": x must be [N, C, H, W], not empty, with the dtype of conv_weight");
  STD_TORCH_CHECK(x.is_contiguous() || is_channels_last(x), kOp, ": x must be contiguous or channels_last");
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, kOp, ": stride must be two positive numbers");
  p.activation = activation_of(activation);
  p.negative_slope = negative_slope;
  p.batch = x.size(0);
  p.height = x.size(2);
  p.width = x.size(3);
  p.stride_y = stride[0];
  p.stride_x = stride[1];
  p.out_height = (p.height - 1) / p.stride_y + 1;
  p.out_width = (p.width - 1) / p.stride_x + 1;
  p.channels_adjacent = !x.is_contiguous();
  core::check_vector(bias, p.channels, conv_weight.scalar_type(), x, kOp, "bias");
  core::check_vector(packed, packed_size(p), conv_weight.scalar_type(), x, kOp, "packed");
  const OutputLayout layout(p);
  Tensor y = core::pooled_empty({layout.sizes, 4}, {layout.strides, 4}, x);
  core::check_same_layout(residual, y, kOp, "residual");
  if (p.channels_adjacent && !packed.has_value()) packed = pack_cpu(conv_weight);

  p.x = x.const_data_ptr();
  p.weight = p.channels_adjacent ? packed->const_data_ptr() : conv_weight.const_data_ptr();
  p.bias = bias.const_data_ptr();
  p.residual = core::data_or_null(residual);
  p.y = y.mutable_data_ptr();
  p.stream = y.numel() * y.element_size() >= kStreamAbove &&
             (p.channels_adjacent ? p.channels : p.pixels()) % kLanes == 0 &&
             reinterpret_cast<uintptr_t>(p.y) % kVectorBytes == 0;
  const int64_t work = p.batch * p.pixels() * p.channels * (p.inputs + 16);
  const int64_t workers = core::workers_for(work, core::kMultiplyAddsPerThread, p.items());
  Scratch scratch;
  const int64_t each = p.workspace_values() * x.element_size();
  auto* const workspace = scratch.take<char>(workers * each).data();
  core::divide(workers, p.items(), [&](int64_t worker, int64_t begin, int64_t end) {
    kernels().run(p, workspace + worker * each, begin, end);
  });
  return y;
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("pointwise_bn_act_pack", TORCH_BOX(&deepops::pack_cpu));
  m.impl("pointwise_bn_act_eval", TORCH_BOX(&deepops::evaluate_cpu));
}
