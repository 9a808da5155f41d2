// act(batch_norm(z)) in training, z the depthwise convolution of x: types and kernel declarations of this folder.
//
// z costs R * S multiplications a value, less than storing and loading it: it is computed again from x in every pass.
// Only where x is much larger than z, or everything is in the cache, the forward keeps it for a while, in y. All data
// is channels_last, [N, H, W, C] in memory; contiguous data: see planes.h. Data of 16 bits is computed with in single
// precision: x, y and their gradients alone are stored in 16 bits.
//
// Kernels take 16 channels at a time, a tile. The last tile ends with the last channel and overlaps the one before it
// where C is no multiple of 16; there both compute and write the same. Per-channel numbers and sums come by slot,
// 16 of them a tile.
#pragma once
#include <cstdint>

#include "batch_norm_act/batch_norm_act.h"

namespace deepops {

// What a call says, whatever device it is for (host.h). inner is out_height * out_width.
struct DepthwiseShape : BatchNormActShape {
  int64_t height, width, out_height, out_width;
  int64_t filter_height, filter_width;                            // R, S
  int64_t stride_y, stride_x, top, left, dilation_y, dilation_x;  // top, left: padding with zeros

  DEEPOPS_HD int64_t filter_size() const { return filter_height * filter_width; }
};

// Work items are the same number of row blocks of every group of images, by shape alone, so that no sum depends on the
// number of threads.
struct DepthwiseProblem : DepthwiseShape {
  static constexpr int64_t kTile = 16;
  int64_t tiles;
  int64_t image_groups, row_blocks;
  int64_t ring_rows;  // of grad_z that are kept while grad_x is computed from them

  int64_t slots() const { return tiles * kTile; }
  int64_t items() const { return image_groups * row_blocks; }
  int64_t first_channel(int64_t tile) const { return tile + 1 < tiles ? tile * kTile : channels - kTile; }
  int64_t slot(int64_t channel) const {
    const int64_t whole = (tiles - 1) * kTile;
    return channel < whole ? channel : whole + channel - (channels - kTile);
  }
};

// One position of the filter, for the outputs of one row: j reads the value at offset + j * step if it lies in
// [first, last), else padding. run: of how many taps this is the first that can be taken together, see rows.h.
struct DepthwiseTap {
  int64_t offset, weight, first, last, run = 1;
};

// Numbers are float, or double for f64 data.
struct DepthwiseForward {
  const void* x;
  const void* filter;  // [tiles][R * S][16]
  void* y;
  bool in_place;                    // `statistics` leaves z in y, where `forward` finds it; not in 16 bits
  const void *mean, *scale, *bias;  // y = act((z - mean) * scale + bias)
  const void* shift;                // statistics are taken of z - shift; double if exact
  double* sums;                     // [items][2][slots]: of z - shift, of its square
};

struct DepthwiseBackward {
  const void *grad_y, *x;
  const void* filter;
  void* grad_x;         // or null
  double* grad_filter;  // [items][tiles][R * S][16], or null
  const void *mean, *scale, *bias;
  const void *mean_grad, *slope_grad;  // grad_z = scale * (g - mean_grad - (z - mean) * slope_grad)
  double* sums;                        // [items][2][slots]: of g and of g * (z - mean)
};

// Passes over work items [begin, end). Each thread has a workspace of its own, its taps and its ring.
struct DepthwiseWorkspace {
  DepthwiseTap* taps;  // 2 * R * S
  void* ring;          // [tiles][ring_rows][out_width][16]; `gradients` only
};

struct DepthwiseKernels {
  // shift[slot]: a number near the mean of z, from a few of its values.
  void (*sample)(const DepthwiseProblem&, const DepthwiseForward&, const DepthwiseWorkspace&, double* shift);
  void (*statistics)(const DepthwiseProblem&, const DepthwiseForward&, const DepthwiseWorkspace&, int64_t begin,
                     int64_t end);
  void (*forward)(const DepthwiseProblem&, const DepthwiseForward&, const DepthwiseWorkspace&, int64_t begin,
                  int64_t end);
  void (*reduce)(const DepthwiseProblem&, const DepthwiseBackward&, const DepthwiseWorkspace&, int64_t begin,
                 int64_t end);
  void (*gradients)(const DepthwiseProblem&, const DepthwiseBackward&, const DepthwiseWorkspace&, int64_t begin,
                    int64_t end);
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const DepthwiseKernels depthwise_kernels;)

}  // namespace deepops
