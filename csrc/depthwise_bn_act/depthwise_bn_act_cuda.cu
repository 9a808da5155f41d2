// depthwise_bn_act on CUDA: allocation, launches, registration.
//
// Two launches for the statistics, one for y; in the backward grad_z is a tensor that lives as long as the call. Grids
// depend on the shape alone, and so does every sum.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "core/allocate.h"
#include "core/gpu_arguments.h"
#include "depthwise_bn_act/depthwise_bn_act_kernels.cuh"
#include "depthwise_bn_act/host.h"

namespace deepops::isa_gpu {
namespace {

constexpr int64_t kPositionsPerPiece = 64, kMostBlocks = 2048;  // of a reduction

DepthwiseShape shape_on_gpu(const Tensor& x, const Tensor& filter, const Integers& stride, const Integers& padding,
                            const Integers& dilation, const std::string& activation, double negative_slope) {
  STD_TORCH_CHECK(gpu::on_gpu(x), "depthwise_bn_act: x must be on the GPU");
  return depthwise_shape_of(x, filter, stride, padding, dilation, activation, negative_slope, false);
}

Partition partition_of(const DepthwiseShape& p) {
  const int64_t tiles = up(p.channels, gpu::kWarp);
  const int64_t most = std::max<int64_t>(1, kMostBlocks / tiles);
  return {p.count(), p.channels, int(tiles), int(std::clamp<int64_t>(p.count() / kPositionsPerPiece, 1, most)),
          nullptr};
}
int64_t blocks(const Partition& partition) { return int64_t(partition.tiles) * partition.pieces; }

// Its partial sums, in memory that lives as long as the tensor.
Tensor give_memory(Partition& partition, const Tensor& like) {
  const int64_t count = 2 * partition.pieces * partition.channels;
  const Tensor memory = core::empty_vector(count, ScalarType::Double, like);
  partition.partial = static_cast<double*>(memory.mutable_data_ptr());
  return memory;
}

// float and double only: depthwise_shape_of() has refused all else.
template <class Call>
void with_type(DataType type, const Call& call) {
  type == DataType::f64 ? call.template operator()<double>() : call.template operator()<float>();
}

std::tuple<Tensor, Tensor, Tensor> train(Tensor x, Tensor conv_weight, OptionalTensor weight, OptionalTensor bias,
                                         OptionalTensor running_mean, OptionalTensor running_var,
                                         OptionalTensor num_batches_tracked, Integers stride, Integers padding,
                                         Integers dilation, std::optional<double> momentum, double eps,
                                         std::string activation, double negative_slope) {
  const DepthwiseShape p = shape_on_gpu(x, conv_weight, stride, padding, dilation, activation, negative_slope);
  check_train(p, x, {}, weight, bias, running_mean, running_var, num_batches_tracked);
  const gpu::Device device(x);
  const gpu::Stream stream = device.stream();
  const TwoVectors found(p, x);
  const Tensor &mean = found.first, &invstd = found.second;
  const OutputLayout layout(p);
  Tensor y = core::empty(layout.sizes, layout.strides, x);
  Partition partition = partition_of(p);
  const Tensor memory = give_memory(partition, x);
  int64_t* const counter = output<int64_t>(num_batches_tracked);
  if (counter) gpu::launch("depthwise_count", depthwise_count, 1, 1, stream, counter);
  with_type(p.dtype, [&]<class T>() {
    const Input<T> data{p, input<T>(x), input<T>(conv_weight)};
    gpu::launch("depthwise_statistics", depthwise_statistics<T>, blocks(partition), kThreads, stream, data, partition);
    // As torch: no update for momentum=None without a count.
    const Learnt<T> learnt{output<T>(mean),
                           output<T>(invstd),
                           output<T>(running_mean),
                           output<T>(running_var),
                           counter,
                           momentum.value_or(0),
                           eps,
                           !momentum.has_value() && counter};
    gpu::launch("depthwise_finish_statistics", depthwise_finish_statistics<T>, up(p.channels, kThreads), kThreads,
                stream, data, partition, learnt);
    const Vectors<T> vectors{input<T>(mean), input<T>(invstd), input<T>(weight), input<T>(bias)};
    gpu::launch("depthwise_forward", depthwise_forward<T>, up(p.count() * p.channels, kThreads), kThreads, stream, data,
                vectors, output<T>(y));
  });
  return {y, mean, invstd};
}

template <class T>
void launch_gradients(const Gradient<T>& gradient, const OptionalTensor& grad_x, const OptionalTensor& grad_filter,
                      const T* mean_grad, const T* slope_grad, Partition partition, const Tensor& x,
                      gpu::Stream stream) {
  const DepthwiseShape& p = gradient.input.shape;
  const int64_t values = p.count() * p.channels;
  const Tensor grad_z = core::empty_vector(values, x.scalar_type(), x);
  gpu::launch("depthwise_grad_z", depthwise_grad_z<T>, up(values, kThreads), kThreads, stream, gradient, mean_grad,
              slope_grad, output<T>(grad_z));
  if (grad_x.has_value())
    gpu::launch("depthwise_grad_x", depthwise_grad_x<T>, up(x.numel(), kThreads), kThreads, stream, p, input<T>(grad_z),
                gradient.input.filter, output<T>(grad_x));
  for (int64_t tap = 0; grad_filter.has_value() && tap < p.filter_size(); ++tap) {
    gpu::launch("depthwise_grad_filter", depthwise_grad_filter<T>, blocks(partition), kThreads, stream, gradient.input,
                input<T>(grad_z), partition, tap / p.filter_width, tap % p.filter_width);
    gpu::launch("depthwise_finish_filter", depthwise_finish_filter<T>, up(p.channels, kThreads), kThreads, stream,
                partition, tap, p.filter_size(), output<T>(grad_filter));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(Tensor grad_y, Tensor x, Tensor conv_weight,
                                                       OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                       Tensor invstd, Integers stride, Integers padding,
                                                       Integers dilation, std::string activation, double negative_slope,
                                                       bool need_x, bool need_conv_weight, bool need_affine) {
  const DepthwiseShape p = shape_on_gpu(x, conv_weight, stride, padding, dilation, activation, negative_slope);
  check_output(p, grad_y, x);
  check_affine(p, x, weight, bias, "depthwise_bn_act_backward");
  check_statistics(p, x, mean, invstd, "depthwise_bn_act_backward");
  const gpu::Device device(x);
  const Tensor grad_x = core::empty_like_if(need_x, x);
  const Tensor grad_conv_weight = core::empty_like_if(need_conv_weight, conv_weight);
  const TwoVectors affine(p, x, need_affine);
  Partition partition = partition_of(p);
  const Tensor memory = give_memory(partition, x), means = core::empty_vector(2 * p.channels, x.scalar_type(), x);
  with_type(p.dtype, [&]<class T>() {
    const Gradient<T> gradient{{p, input<T>(x), input<T>(conv_weight)},
                               {input<T>(mean), input<T>(invstd), input<T>(weight), input<T>(bias)},
                               input<T>(grad_y)};
    T *const mean_grad = output<T>(means), *const slope_grad = mean_grad + p.channels;
    gpu::launch("depthwise_reduce", depthwise_reduce<T>, blocks(partition), kThreads, device.stream(), gradient,
                partition);
    gpu::launch("depthwise_finish_reduce", depthwise_finish_reduce<T>, up(p.channels, kThreads), kThreads,
                device.stream(), partition, input<T>(invstd), mean_grad, slope_grad,
                need_affine ? output<T>(affine.first) : nullptr, need_affine ? output<T>(affine.second) : nullptr);
    if (!need_x && !need_conv_weight) return;
    launch_gradients<T>(gradient, need_x ? OptionalTensor(grad_x) : std::nullopt,
                        need_conv_weight ? OptionalTensor(grad_conv_weight) : std::nullopt, mean_grad, slope_grad,
                        partition, x, device.stream());
  });
  return {grad_x, grad_conv_weight, affine.first, affine.second};
}

}  // namespace
}  // namespace deepops::isa_gpu

DEEPOPS_GPU_LIBRARY_IMPL(m) {
  m.impl("depthwise_bn_act_train", TORCH_BOX(&deepops::isa_gpu::train));
  m.impl("depthwise_bn_act_backward", TORCH_BOX(&deepops::isa_gpu::backward_of));
}
