// act(batch_norm(x) + residual): types and kernel declarations shared by the files of this folder.
//
// Geometry. A tensor of shape [N, C, *] is seen in one of two ways:
//   planar   [N, C, L] with L = product of the last sizes, in memory order; one channel is N runs of L values
//   rows     a matrix of `columns` values a row, for channels_last and for planar tensors with L < 16. A row is a whole
//            number of base periods, so that `columns` is a multiple of 16 and no vector has a tail; what is left
//            over at the end is one incomplete row. Column j belongs to channel (j % period) / group.
#pragma once
#include <cstdint>

#include "core/cpu_isa.h"
#include "core/dtype.h"

namespace deepops {

enum class Activation : int { identity, relu, leaky_relu, relu6, silu, gelu, gelu_tanh, hardswish };

// Whether the derivative can be read off the output: the backward then keeps the output, not the residual.
inline bool derivative_from_output(Activation activation, double negative_slope) {
  return activation == Activation::relu || activation == Activation::relu6 ||
         (activation == Activation::leaky_relu && negative_slope >= 0);
}

// What a call says, whatever device it is for (host.h).
struct BatchNormActShape {
  core::DataType dtype;
  Activation activation;
  double negative_slope;
  int64_t batch, channels, inner;  // N, C, L
  bool channels_adjacent;          // the values of neighbouring channels are neighbours in memory
  bool exact;  // so few values per channel that the rounding of a single term would show: statistics
               // are taken in double from the start
  // Offsets of samples spread over the values of channel 0; `next_channel` further on lie those of the next one.
  int64_t samples, sample_offset[8], next_channel;

  DEEPOPS_HD int64_t count() const { return batch * inner; }  // values of a channel
};

struct BatchNormActProblem : BatchNormActShape {
  bool planar;
  int64_t rows, columns, period, group, tail;  // rows view: complete rows, values in the incomplete one
  // Statistics are summed in pieces that depend on the shape alone, so that no sum depends on the number of threads.
  // planar: `pieces` runs of whole planes per channel; rows: `pieces` blocks of `rows_per_piece` rows (and the tail).
  int64_t pieces, rows_per_piece;
  int64_t rows_at_once;  // rows of an elementwise pass that share loaded per-channel numbers
  // Sums of single-precision terms go to double after `flush` additions: sooner for 16-bit data, whose few different
  // values bring the same rounding errors over and over.
  int flush;
};

// Per-channel numbers come as one value per channel (planar) or per column (rows), float, or double for f64 data.
struct BatchNormActForward {
  const void* x;
  const void* residual;  // or null
  void* y;
  const void *mean, *scale, *bias;  // z = (x - mean) * scale + bias
  const void* shift;                // statistics are taken of x - shift; double if exact
  bool stream;                      // store past the caches; data on vector boundaries
  double* sums;                     // planar [C][pieces][2], rows [items][2][columns]: of x - shift, of its square
};

struct BatchNormActBackward {
  const void *grad_y, *x;
  const void* kept;  // output or residual, or null: derivative_from_output()
  bool kept_is_output;
  bool training;
  bool stream;                   // as in the forward
  void *grad_x, *grad_residual;  // or null
  const void *mean, *scale, *bias;
  const void *mean_grad, *slope_grad;  // grad_x = scale * (g - mean_grad - (x - mean) * slope_grad)
  double* sums;                        // of g and of g * (x - mean), laid out as in the forward
};

// A range of work items. planar: statistics and reductions have channels * pieces items, channel-major; elementwise
// passes have channels * batch planes, channel-major. rows: `pieces` items, and one more if there is a tail.
struct BatchNormActKernels {
  // shift[c] for channels [begin, end): a number near the channel's mean.
  void (*sample)(const BatchNormActProblem&, const void* x, int64_t begin, int64_t end, double* shift);
  void (*statistics)(const BatchNormActProblem&, const BatchNormActForward&, int64_t begin, int64_t end);
  void (*forward)(const BatchNormActProblem&, const BatchNormActForward&, int64_t begin, int64_t end);
  void (*reduce)(const BatchNormActProblem&, const BatchNormActBackward&, int64_t begin, int64_t end);
  void (*backward)(const BatchNormActProblem&, const BatchNormActBackward&, int64_t begin, int64_t end);
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const BatchNormActKernels batch_norm_act_kernels;)

}  // namespace deepops
