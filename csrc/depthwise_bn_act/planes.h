// depthwise_bn_act of contiguous data, [N, C, H, W] in memory: types and kernel declarations.
//
// A channel is finished before the next one begins: its planes of all images are in the cache when the second pass
// over them comes. A plane of x is copied into memory of the thread's own, with its padding around it and its columns
// sorted by their remainder of stride_x: then every output reads all its values, lanes of 16 neighbouring outputs, at
// the same distances from its place, and nothing has to be known of borders and strides. Likewise grad_z, for grad_x.
#pragma once
#include <cstdint>

#include "depthwise_bn_act/depthwise_bn_act.h"

namespace deepops {

// One position of the filter: the value at `offset` from an output's place counts filter[weight] times. run: how many
// are added up on their own before they join the sum, 0 for those that are not the first of such a run.
struct PlanarTap {
  int64_t offset, weight, run;
  int64_t phase;  // of grad_x: (row % stride_y) * stride_x + column % stride_x
};

// Row r, column u of x with its padding lies at r * x_row + u % stride_x * x_pitch + u / stride_x. Row r, column j of
// grad_z lies at (grad_above + r) * grad_pitch + grad_left + j; around it are zeros.
struct DepthwisePlanes : DepthwiseShape {
  int64_t x_rows, x_row, x_pitch;
  int64_t grad_rows, grad_above, grad_left, grad_pitch;
  int64_t half_rows, half_pitch;      // of every second column of grad_x, where stride_x is 2
  int64_t z_pitch;                    // of rows of z
  int64_t images;                     // that are worked on at a time
  bool keep;                          // these are all: the backward's second pass finds x and z of its first
  const PlanarTap *taps, *grad_taps;  // R * S each; those of grad_x by phase

  int64_t x_values() const { return x_rows * x_row; }
  int64_t grad_values() const { return grad_rows * grad_pitch; }
  int64_t half_values() const { return half_rows * half_pitch; }
  int64_t z_values() const { return keep ? out_height * z_pitch : 0; }
};

// Numbers are float, or double for f64 data, one per channel.
struct PlanarForward {
  const void* x;
  const void* filter;  // [C][R * S]
  void* y;
  bool in_place;                    // `statistics` leaves z in y, where `forward` finds it
  const void *mean, *scale, *bias;  // y = act((z - mean) * scale + bias)
};

struct PlanarBackward {
  const void *grad_y, *x;
  const void* filter;
  void* grad_x;         // or null
  double* grad_filter;  // [C][R * S], or null
  const void *mean, *scale, *bias;
  const void *mean_grad, *slope_grad;  // grad_z = scale * (g - mean_grad - (z - mean) * slope_grad)
};

// What a thread works in, for `images` of a channel; zeros when it begins.
struct PlanarMemory {
  void *x, *grad, *half, *z;
  double* filter_sums;  // [R * S][16]
};

// Passes over all images of a channel.
struct DepthwisePlanarKernels {
  // sums: a number near the mean of z; of z - that number; of its square. exact: terms are taken in double.
  void (*statistics)(const DepthwisePlanes&, const PlanarForward&, const PlanarMemory&, int64_t channel, bool exact,
                     double* sums);
  void (*forward)(const DepthwisePlanes&, const PlanarForward&, const PlanarMemory&, int64_t channel);
  // sums: of g, of g * (z - mean).
  void (*reduce)(const DepthwisePlanes&, const PlanarBackward&, const PlanarMemory&, int64_t channel, double* sums);
  void (*gradients)(const DepthwisePlanes&, const PlanarBackward&, const PlanarMemory&, int64_t channel);
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const DepthwisePlanarKernels depthwise_planar_kernels;)

}  // namespace deepops
