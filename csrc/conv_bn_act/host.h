// Host side of conv_bn_act: what a call says, and whether its tensors fit together.
//
// The whole op is for NVIDIA GPUs of compute capability 8.0 and newer (tensor-core code does not exist for older ones,
// and one rule is easier to remember than two). deepops/_conv_choice.py asks for nothing else.
#pragma once
#include <string>
#include <vector>

#include "batch_norm_act/host.h"
#include "conv_bn_act/conv_bn_act.h"

namespace deepops {

using Integers = std::vector<int64_t>;

inline constexpr int64_t kMostPixels = INT32_MAX - 4096;  // of the output: row numbers of a last, incomplete tile fit
inline constexpr int64_t kMostPerSide = 1 << 24;          // sizes, padding, stride, dilation: so do positions

inline bool is_aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

// [N, K, P, Q], channels_last.
struct ConvOutputLayout {
  int64_t sizes[4], strides[4];
  explicit ConvOutputLayout(const ConvProblem& p)
      : sizes{p.batch, p.out_channels, p.out_height, p.out_width},
        strides{int64_t(p.out_height) * p.out_width * p.out_channels, 1, int64_t(p.out_width) * p.out_channels,
                p.out_channels} {}
};

inline void check_conv_data(const Tensor& x, const Tensor& conv_weight, const char* op) {
  STD_TORCH_CHECK(x.dim() == 4, op, ": x must be [N, C, H, W], channels_last");
  STD_TORCH_CHECK(x.numel() > 0 || x.size(0) == 0, op, ": images of x are empty");
  STD_TORCH_CHECK(is_channels_last(x), op, ": x must be [N, C, H, W], channels_last");
  core::check_same_device(conv_weight, x, op, "conv_weight");
  STD_TORCH_CHECK(conv_weight.dim() == 4 && is_channels_last(conv_weight), op,
                  ": conv_weight must be [K, C, R, S], channels_last");
  STD_TORCH_CHECK(conv_weight.scalar_type() == x.scalar_type(), op, ": conv_weight must have the dtype of x");
  STD_TORCH_CHECK(conv_weight.size(1) == x.size(1), op, ": x has ", x.size(1), " channels, conv_weight is for ",
                  conv_weight.size(1), "; groups are not supported");
  STD_TORCH_CHECK(conv_weight.numel() > 0, op, ": conv_weight is empty");
  const core::DataType type = core::data_type_of(x, op, "x");
  const int64_t channels = x.size(1);
  const bool direct = channels <= ConvProblem::kDirectChannels;
  STD_TORCH_CHECK(type != DataType::f64, op, ": x must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(direct || (type != DataType::f32 && channels % ConvProblem::kPack == 0), op, ": x has ", channels,
                  type == DataType::f32 ? " channels of float32" : " channels",
                  "; allowed: up to 4 in float32, float16 and bfloat16, and multiples of 8 in the last two");
  STD_TORCH_CHECK(direct || (is_aligned(x) && is_aligned(conv_weight)), op,
                  ": x and conv_weight must begin on 16-byte boundaries");
}

// stride, dilation: y, x. padding: top, bottom, left, right.
inline ConvProblem conv_problem_of(const Tensor& x, const Tensor& conv_weight, const Integers& stride,
                                   const Integers& padding, const Integers& dilation, const char* op) {
  check_conv_data(x, conv_weight, op);
  STD_TORCH_CHECK(stride.size() == 2 && dilation.size() == 2 && padding.size() == 4, op,
                  ": stride and dilation have 2 numbers, padding has 4");
  for (const int64_t value : {stride[0], stride[1], dilation[0], dilation[1]})
    STD_TORCH_CHECK(value >= 1 && value <= kMostPerSide, op, ": stride and dilation must be 1 to 2^24, not ", value);
  for (const int64_t value : padding)
    STD_TORCH_CHECK(value >= 0 && value <= kMostPerSide, op, ": padding must be 0 to 2^24, not ", value);
  for (const Tensor* tensor : {&x, &conv_weight}) {
    for (int64_t d = 0; d < 4; ++d)
      STD_TORCH_CHECK(tensor->size(d) <= kMostPerSide, op, ": no size may be more than 2^24, not ", tensor->size(d));
  }
  const int64_t room_y = x.size(2) + padding[0] + padding[1] - dilation[0] * (conv_weight.size(2) - 1) - 1;
  const int64_t room_x = x.size(3) + padding[2] + padding[3] - dilation[1] * (conv_weight.size(3) - 1) - 1;
  STD_TORCH_CHECK(room_y >= 0 && room_x >= 0, op, ": conv_weight is larger than x with its padding");
  const int64_t out_height = room_y / stride[0] + 1, out_width = room_x / stride[1] + 1;
  STD_TORCH_CHECK(x.size(0) <= kMostPixels / out_height / out_width, op, ": the output has more than ", kMostPixels,
                  " pixels");
  STD_TORCH_CHECK(conv_weight.numel() / conv_weight.size(0) <= INT32_MAX, op, ": a filter has more than 2^31 values");
  ConvProblem p{};
  p.dtype = core::data_type_of(x, op, "x");
  p.batch = int(x.size(0));
  p.channels = int(x.size(1));
  p.height = int(x.size(2));
  p.width = int(x.size(3));
  p.out_channels = int(conv_weight.size(0));
  p.filter_height = int(conv_weight.size(2));
  p.filter_width = int(conv_weight.size(3));
  p.out_height = int(out_height);
  p.out_width = int(out_width);
  p.stride_y = int(stride[0]);
  p.stride_x = int(stride[1]);
  p.top = int(padding[0]);
  p.left = int(padding[2]);
  p.dilation_y = int(dilation[0]);
  p.dilation_x = int(dilation[1]);
  return p;
}

inline void check_conv_eval(const ConvProblem& p, const Tensor& x, const OptionalTensor& residual, const Tensor& scale,
                            const Tensor& shift, const char* op) {
  core::check_vector(scale, p.out_channels, ScalarType::Float, x, op, "scale");
  core::check_vector(shift, p.out_channels, ScalarType::Float, x, op, "shift");
  if (!residual.has_value()) return;
  core::check_same_device(*residual, x, op, "residual");
  const ConvOutputLayout layout(p);
  bool same = residual->dim() == 4 && residual->scalar_type() == x.scalar_type() && is_channels_last(*residual);
  for (int64_t d = 0; same && d < 4; ++d) same = residual->size(d) == layout.sizes[d];
  STD_TORCH_CHECK(same, op, ": residual must have the shape of the output and the dtype of x, channels_last");
  STD_TORCH_CHECK(is_aligned(*residual), op, ": residual must begin on a 16-byte boundary");
}

inline void check_conv_statistics(const ConvProblem& p, const Tensor& x, const OptionalTensor& running_mean,
                                  const OptionalTensor& running_var, const OptionalTensor& num_batches_tracked,
                                  const char* op) {
  BatchNormActShape statistics{};
  statistics.dtype = p.dtype;
  statistics.channels = p.out_channels;
  check_running(statistics, x, running_mean, running_var, num_batches_tracked, op);
  STD_TORCH_CHECK(p.rows() != 1, op, ": more than one value per channel is needed");
}

}  // namespace deepops
