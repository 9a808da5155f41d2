// act(batch_norm(z)) in training, z the 1x1 convolution of x to more channels: types and kernel declarations of this
// folder.
//
// x is a matrix [rows, C], z = x W^T is one [rows, K]. z is linear in x and batch norm's backward is affine in z, so
// all that needs a pass over z elsewhere is had from x, which is smaller:
//   mean(z) = W mean(x),  var(z) = diag(W cov(x) W^T)
//   y = act(x W'^T + b'),  W' = scale W
//   g = grad_y act'(..),  P = g^T (x - mean(x)),  sum g (z - mean(z)) = diag(P W^T)
//   grad_W = scale (P - slope_grad rows W cov(x)),  grad_x = g W' - const - (x - mean(x)) W^T diag(scale slope_grad) W
// with slope_grad = sum g (z - mean(z)) / var(z) / rows. So z is never stored: y is written once, grad_y read once. The
// only thing of the size of z that the backward keeps is a bit a value, on which side of its kink the activation was;
// an activation that is no piecewise linear function computes z again.
//
// x comes centred on its rounded mean to every product: no digits are lost to a mean far above sigma. Its covariance is
// taken in double, see `moments`.
//
// Contiguous data, [N, C, H, W] in memory, is N such matrices lying on their sides, [C, pixels]: the same passes with
// lanes along the pixels (pointwise_planar_kernel_cpu.cpp).
#pragma once
#include <cstdint>

#include "batch_norm_act/batch_norm_act.h"

namespace deepops {

// channels is K, inputs is C. Work items are ranges of rows, or of blocks of pixels, by shape alone, so that no sum
// depends on the number of threads.
struct PointwiseProblem : BatchNormActShape {
  static constexpr int64_t kLanes = 16;
  static constexpr int64_t kBlock = 24;   // rows that are taken at a time: additions in single precision
  static constexpr int64_t kPixels = 32;  // of an image in planes
  int64_t inputs, items;

  bool planar() const { return !channels_adjacent; }
  int64_t rows() const { return count(); }
  int64_t first_row(int64_t item) const { return item * rows() / items; }
  int64_t x_at(int64_t row, int64_t c) const {
    return planar() ? (row / inner * inputs + c) * inner + row % inner : row * inputs + c;
  }
  int64_t blocks_of_image() const { return (inner + kPixels - 1) / kPixels; }
  int64_t first_block(int64_t item) const { return item * (batch * blocks_of_image()) / items; }
  int64_t slots() const { return (channels + kLanes - 1) / kLanes * kLanes; }      // K with padding
  int64_t input_slots() const { return (inputs + kLanes - 1) / kLanes * kLanes; }  // C with padding
  int64_t bits_per_row() const { return slots() / kLanes; }                        // words of 16 bits
  int64_t words_of_plane() const { return (inner + kLanes - 1) / kLanes; }
  int64_t words() const { return planar() ? batch * words_of_plane() * channels : rows() * bits_per_row(); }
  // Numbers that `moments` and `backward` leave for an item.
  int64_t moments_of_item() const { return (1 + input_slots()) * input_slots(); }
  int64_t sums_of_item() const { return planar() ? slots() * (1 + input_slots()) : (1 + inputs) * slots(); }
  // Where the sum of (x_c - center_c) g_k is among them. That of g_k is number k.
  int64_t product_at(int64_t k, int64_t c) const {
    return planar() ? slots() + k * input_slots() + c : (1 + c) * slots() + k;
  }
};

// Numbers are float, or double for f64 data. Padding is 0. In planes, [rows, C] is [N, C, pixels], and so on.
struct PointwiseArguments {
  const void* x;               // [rows, C]
  const void* center;          // [input slots]: of x
  const void* forward_weight;  // W', [slots / 16][C][16]; not for planes
  const void* bias;            // [slots]: b'
  const double* shift;         // `moments`: [input slots], near the mean of x
  double* moments;             // [items][1 + input slots][input slots]: sums of d, of d d^T, d = x - shift
  void* y;                     // [rows, K]
  bool stream;                 // store y past the caches; rows on vector boundaries
  uint16_t* bits;              // written by `forward`, read by `backward`, or null. [rows, bits_per_row], a bit a
                               // channel, or [N, words_of_plane, K], a bit a pixel
  // backward
  const void* grad_y;           // [rows, K]
  const void* backward_weight;  // W', [slots][input slots]
  double* sums;                 // [items][1 + inputs][slots]: of g, of (x - center)^T g. Planes: [items], in each
                                // [slots], [slots][input slots]: of g, of g^T (x - center)
  void* grad_x;                 // [rows, C], or null; g W' after `backward`
  bool exact;                   // `finish` computes in double, and so are its numbers
  const void* slope;            // [input slots][input slots]
  const void* constant;         // [input slots]
};

// Passes over items [begin, end). workspace: of this thread, workspace_values(p) of the data's type.
struct PointwiseKernels {
  void (*moments)(const PointwiseProblem&, const PointwiseArguments&, void* workspace, int64_t begin, int64_t end);
  void (*forward)(const PointwiseProblem&, const PointwiseArguments&, void* workspace, int64_t begin, int64_t end);
  void (*backward)(const PointwiseProblem&, const PointwiseArguments&, void* workspace, int64_t begin, int64_t end);
  void (*finish)(const PointwiseProblem&, const PointwiseArguments&, void* workspace, int64_t begin, int64_t end);
};

// to [rows, columns] = a [rows, size] b [size, columns], or, transposed, with a [size, rows]; dense, rows and columns
// multiples of 16. For what the host does with weights.
using PointwiseProduct = void(const double* a, bool transposed, const double* b, double* to, int64_t rows,
                              int64_t columns, int64_t size);

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const PointwiseKernels pointwise_kernels;
                             extern const PointwiseKernels pointwise_planar_kernels;
                             PointwiseProduct pointwise_product;)

inline constexpr int64_t kWidestPanel = 48;

// A block of x, of grad_x, of a panel of g; and what a tile reads beyond them. In planes a block of x comes twice, and
// there are sums of g in lanes.
inline int64_t workspace_values(const PointwiseProblem& p) {
  if (p.planar())
    return PointwiseProblem::kPixels * (3 * p.input_slots() + kWidestPanel) + p.slots() * PointwiseProblem::kLanes;
  return PointwiseProblem::kBlock * (2 * p.input_slots() + kWidestPanel) + 2 * PointwiseProblem::kLanes;
}

}  // namespace deepops
