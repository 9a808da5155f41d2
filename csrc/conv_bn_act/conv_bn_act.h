// A convolution with what follows it in one GPU kernel: types shared by the files of this folder.
//
// All data is channels_last in memory: x [N, H, W, C], conv_weight [K, R, S, C], y and residual [N, P, Q, K]. A row is
// an output pixel, m = (n * P + p) * Q + q; a column is an output channel.
//
// Two kernels compute the sums, tile by tile: implicit_gemm.cuh on tensor cores (fp16, bf16, C a multiple of 8) and
// direct.cuh (C up to 4). A finished tile lies in shared memory, whence epilogue.cuh brings it to y.
#pragma once
#include <cstdint>

#include "batch_norm_act/batch_norm_act.h"
#include "core/dtype.h"

namespace deepops {

// What becomes of the sums.
enum class ConvResult : int {
  evaluation,  // y = act(sum * scale + shift + residual)
  statistics,  // y = sum, and the statistics of y as it is stored
};

// All integers of a call. host.h makes sure that none of them, nor a position in the padding, overflows.
struct ConvProblem {
  static constexpr int kDirectChannels = 4;  // up to here direct.cuh
  static constexpr int kPack = 8;            // 16 bytes of 16-bit values: what implicit_gemm.cuh takes at once

  core::DataType dtype;
  int batch, height, width, channels;                         // N, H, W, C
  int out_height, out_width, out_channels;                    // P, Q, K
  int filter_height, filter_width;                            // R, S
  int stride_y, stride_x, top, left, dilation_y, dilation_x;  // top, left: padding with zeros

  DEEPOPS_HD int rows() const { return batch * out_height * out_width; }
  DEEPOPS_HD int depth() const { return filter_height * filter_width * channels; }  // terms of a sum
  DEEPOPS_HD bool direct() const { return channels <= kDirectChannels; }
};

}  // namespace deepops
