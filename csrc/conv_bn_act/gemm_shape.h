// A convolution as a product of matrices: the integers that the kernels of implicit_gemm.cuh get. For host and device.
#pragma once
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "conv_bn_act/conv_bn_act.h"

namespace deepops::isa_gpu {

// A position (y, x) of the input is one number, y * unit + x, where unit is a power of 2 and x has one bit more than it
// needs. Two sign bits of it, the highest of y and the highest of x, tell whether it is above or left of the image,
// those of `last` minus the number whether it is below or right of it: two subtractions and one test for each 16 bytes
// that a thread copies, and one register to keep.
struct GemmShape {
  int rows, columns, depth;     // of the product
  int height, width, channels;  // of x
  int out_height, out_width;
  int stride_y, stride_x, top, left;
  uint32_t unit, last, signs;  // last: position of the last pixel of an image; signs: the two bits
  // The filter, as positions and in pixels, both with the dilation: from one tap to the next in its row, to the first
  // of the next row; what its last tap's column and row come before.
  int dilation_x, next_row_pixels, filter_width;
  uint32_t next_row, filter_end;
};

inline GemmShape gemm_shape_of(const ConvProblem& p) {
  const auto reach = [](int64_t size, int64_t out, int64_t stride, int64_t before, int64_t dilation, int64_t taps) {
    return std::max(size + before, (out - 1) * stride + (taps - 1) * dilation) + 1;  // of positions, in one direction
  };
  const int dilation_y = p.filter_height > 1 ? p.dilation_y : 1, dilation_x = p.filter_width > 1 ? p.dilation_x : 1;
  constexpr int64_t kPast = 8;  // taps below the filter that a thread comes to at the end of depth
  const int64_t reach_y = reach(p.height, p.out_height, p.stride_y, p.top, dilation_y, p.filter_height + kPast);
  const int64_t reach_x = reach(p.width, p.out_width, p.stride_x, p.left, dilation_x, p.filter_width + 1);
  int bits = 1;  // of x
  while ((int64_t(1) << (bits - 1)) < reach_x) ++bits;
  constexpr int64_t kMost = INT32_MAX;
  const bool fits = bits < 31 && reach_y <= kMost >> bits && reach_y * p.width + reach_x <= kMost &&
                    p.depth() <= kMost - 1024 && int64_t(p.batch) * p.height <= (kMost - reach_x) / p.width - reach_y;
  STD_TORCH_CHECK(fits, "conv_bn_act: images of ", p.height, " x ", p.width, ", ", p.batch,
                  " of them, are too large for 32-bit positions");
  GemmShape s{};
  s.rows = p.rows();
  s.columns = p.out_channels;
  s.depth = p.depth();
  s.height = p.height;
  s.width = p.width;
  s.channels = p.channels;
  s.out_height = p.out_height;
  s.out_width = p.out_width;
  s.stride_y = p.stride_y;
  s.stride_x = p.stride_x;
  s.top = p.top;
  s.left = p.left;
  s.unit = uint32_t(1) << bits;
  s.last = uint32_t(p.height - 1) * s.unit + uint32_t(p.width - 1);
  s.signs = uint32_t(1) << 31 | s.unit / 2;
  s.dilation_x = dilation_x;
  s.filter_width = p.filter_width * dilation_x;
  const int back = (p.filter_width - 1) * dilation_x;
  s.next_row = uint32_t(dilation_y) * s.unit - uint32_t(back);
  s.next_row_pixels = dilation_y * p.width - back;
  s.filter_end = uint32_t(p.filter_height * dilation_y) * s.unit;
  return s;
}

}  // namespace deepops::isa_gpu
