// Host side of depthwise_bn_act on every device: what a call says, and whether its tensors fit together.
#pragma once
#include <vector>

#include "batch_norm_act/host.h"
#include "depthwise_bn_act/depthwise_bn_act.h"

namespace deepops {

using Integers = std::vector<int64_t>;

inline constexpr int64_t kLeastChannels = DepthwiseProblem::kTile;

// stride, dilation: y, x. padding: top, bottom, left, right. cpu_training: whether there are kernels for contiguous
// data, and for channels_last data of 16 bits.
inline DepthwiseShape depthwise_shape_of(const Tensor& x, const Tensor& filter, const Integers& stride,
                                         const Integers& padding, const Integers& dilation,
                                         const std::string& activation, double negative_slope, bool cpu_training) {
  constexpr const char* kOp = "depthwise_bn_act";
  DepthwiseShape p{};
  const bool channels_last = x.dim() == 4 && is_channels_last(x);
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && (channels_last || (cpu_training && x.is_contiguous())), kOp,
                  ": x must be [N, C, H, W], not empty, channels_last", cpu_training ? " or contiguous" : "");
  p.dtype = core::data_type_of(x, kOp, "x");
  STD_TORCH_CHECK(p.dtype <= DataType::f64 || (cpu_training && channels_last), kOp, ": x must be float32 or float64",
                  cpu_training ? ", in channels_last also float16 or bfloat16" : "");
  core::check_same_device(filter, x, kOp, "conv_weight");
  STD_TORCH_CHECK(filter.dim() == 4 && filter.size(0) == x.size(1) && filter.size(1) == 1 && filter.numel() > 0 &&
                      filter.scalar_type() == core::opmath_scalar_type(p.dtype) &&
                      (filter.is_contiguous() || is_channels_last(filter)),
                  kOp, ": conv_weight must be [C, 1, R, S], dense, with the dtype of x, float32 beside 16-bit data");
  STD_TORCH_CHECK(x.size(1) >= kLeastChannels || !channels_last, kOp, ": x must have at least ", kLeastChannels,
                  " channels");
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4, kOp,
                  ": stride and dilation have 2 numbers, padding has 4");
  for (const int64_t value : {stride[0], stride[1], dilation[0], dilation[1]})
    STD_TORCH_CHECK(value >= 1, kOp, ": stride and dilation must be positive");
  for (const int64_t value : padding) STD_TORCH_CHECK(value >= 0, kOp, ": padding must not be negative");
  p.activation = activation_of(activation);
  p.negative_slope = negative_slope;
  p.batch = x.size(0);
  p.channels = x.size(1);
  p.height = x.size(2);
  p.width = x.size(3);
  p.filter_height = filter.size(2);
  p.filter_width = filter.size(3);
  p.stride_y = stride[0];
  p.stride_x = stride[1];
  p.top = padding[0];
  p.left = padding[2];
  p.dilation_y = dilation[0];
  p.dilation_x = dilation[1];
  const int64_t room_y = p.height + padding[0] + padding[1] - p.dilation_y * (p.filter_height - 1) - 1;
  const int64_t room_x = p.width + padding[2] + padding[3] - p.dilation_x * (p.filter_width - 1) - 1;
  STD_TORCH_CHECK(room_y >= 0 && room_x >= 0, kOp, ": conv_weight is larger than x");
  p.out_height = room_y / p.stride_y + 1;
  p.out_width = room_x / p.stride_x + 1;
  p.inner = p.out_height * p.out_width;
  p.channels_adjacent = channels_last;
  p.exact = p.count() <= kExactBelow;
  return p;
}

// [N, C, out_height, out_width], in the layout of x.
struct OutputLayout {
  int64_t sizes[4], strides[4];
  explicit OutputLayout(const DepthwiseShape& p)
      : sizes{p.batch, p.channels, p.out_height, p.out_width},
        strides{p.inner * p.channels, p.channels_adjacent ? 1 : p.inner,
                p.out_width * (p.channels_adjacent ? p.channels : 1), p.channels_adjacent ? p.channels : 1} {}
};

inline void check_output(const DepthwiseShape& p, const Tensor& grad_y, const Tensor& x) {
  constexpr const char* kOp = "depthwise_bn_act_backward";
  core::check_same_device(grad_y, x, kOp, "grad_y");
  const OutputLayout layout(p);
  bool same = grad_y.dim() == 4 && grad_y.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < 4; ++d)
    same = grad_y.size(d) == layout.sizes[d] && (grad_y.size(d) == 1 || grad_y.stride(d) == layout.strides[d]);
  STD_TORCH_CHECK(same, kOp, ": grad_y must have the shape of the output, and the dtype and memory layout of x");
}

}  // namespace deepops
