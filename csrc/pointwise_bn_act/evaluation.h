// act(x W^T + b + residual): a 1x1 convolution in evaluation, batch norm folded into W and b. Types and kernel
// declarations.
//
// Each output is written once, by the epilogue of its product, into memory of the pool. (A result of 51 MB from the
// heap costs 12,500 page faults, as long as the product itself.) A sum is that of core/packed_product.h: the same bits
// for any number of rows and threads.
#pragma once
#include <cstdint>

#include "batch_norm_act/batch_norm_act.h"
#include "core/panels.h"

namespace deepops {

// Numbers are float, or double for f64 data.
struct PointwiseEvaluation {
  static constexpr int64_t kRowsAtOnce = 96;  // outputs of channels_last data that a panel of weights is used for

  core::DataType dtype;
  Activation activation;
  double negative_slope;
  int64_t batch, inputs, channels;  // N, C, K
  int64_t height, width, out_height, out_width, stride_y, stride_x;
  bool channels_adjacent;
  bool stream;         // store y past the caches; y on vector boundaries
  const void* x;       // [N, C, height, width]
  const void* weight;  // [K, C]; with adjacent channels [panels][C][64]
  const void *bias, *residual;
  void* y;

  int64_t pixels() const { return out_height * out_width; }
  bool is_dense() const { return stride_y == 1 && stride_x == 1; }
  // Rows of the output with adjacent channels; else 64 pixels of an image.
  int64_t items() const { return batch * (channels_adjacent ? pixels() : panels_of(pixels())); }
  // For each thread: rows of x, or a panel of pixels.
  int64_t workspace_values() const {
    if (!channels_adjacent) return inputs * kPanelColumns;
    return is_dense() ? 0 : kRowsAtOnce * inputs;
  }
};

struct PointwiseEvaluationKernels {
  // weight [K, C] to panels [begin, end) of `panels`.
  void (*pack)(const PointwiseEvaluation&, const void* weight, void* panels, int64_t begin, int64_t end);
  void (*run)(const PointwiseEvaluation&, void* workspace, int64_t begin, int64_t end);  // over items
};

DEEPOPS_DECLARE_FOR_EACH_ISA(extern const PointwiseEvaluationKernels pointwise_evaluation_kernels;)

}  // namespace deepops
