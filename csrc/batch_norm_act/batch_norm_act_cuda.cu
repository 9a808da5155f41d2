// batch_norm_act on CUDA: checks, allocation, the order of the launches (gpu_launches.h), registration.
//
// At most two launches a pass: sums, then elementwise work. One where the data stays on the chip.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "batch_norm_act/gpu_launches.h"
#include "batch_norm_act/persistent_launches.h"
#include "batch_norm_act/sync.cuh"

namespace deepops::isa_gpu {
namespace {

// Of a result that may not be wanted: null then.
template <class A>
A* wanted_data(const Tensor& tensor) {
  return tensor.numel() ? static_cast<A*>(tensor.mutable_data_ptr()) : nullptr;
}

// One thread: what is left of a step without data.
DEEPOPS_KERNEL(1) count_batch(int64_t* num_batches_tracked) {
  gpu::store(num_batches_tracked, gpu::load(num_batches_tracked) + 1);
}

void launch_count(int64_t* num_batches_tracked, gpu::Stream stream) {
  if (num_batches_tracked) gpu::launch("batch_norm_act_count", count_batch, 1, 1, stream, num_batches_tracked);
}

std::tuple<Tensor, Tensor, Tensor> train(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                                         OptionalTensor running_mean, OptionalTensor running_var,
                                         OptionalTensor num_batches_tracked, std::optional<double> momentum, double eps,
                                         std::string activation, double negative_slope) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_train(p, x, residual, weight, bias, running_mean, running_var, num_batches_tracked);
  const gpu::Device device(x);
  TwoVectors found(p, x);  // mean and invstd
  Tensor y = core::empty_like(x);
  int64_t* const counter = output<int64_t>(num_batches_tracked);
  if (x.numel() == 0) {  // no statistics to take; as in torch nothing is learnt from an empty batch
    found.zero();
    launch_count(counter, device.stream());
    return {y, found.first, found.second};
  }
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    using A = OpMath<T>;
    Statistics<T> args{};
    args.mean = output<A>(found.first);
    args.invstd = output<A>(found.second);
    args.running = {output<A>(running_mean), output<A>(running_var)};
    args.num_batches_tracked = momentum.has_value() ? nullptr : counter;
    args.factor = momentum.value_or(0);  // as torch: no update for momentum=None without a count
    args.eps = eps;
    const auto forward =
        forward_of<T>(p, x, residual, source_of<A>(found.first, found.second, weight, bias), y, counter);
    if (launch_persistent_forward(p, x, args, forward, device.stream())) return;
    launch_statistics<T>(p, x, args, device.stream());
    launch_forward<T>(p, forward, device.stream());
  });
  return {y, found.first, found.second};
}

Tensor eval(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, Tensor mean, Tensor invstd,
            std::string activation, double negative_slope) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_eval(p, x, residual, weight, bias, mean, invstd);
  const gpu::Device device(x);
  Tensor y = core::empty_like(x);
  if (x.numel() == 0) return y;
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    const auto source = source_of<OpMath<T>>(mean, invstd, weight, bias);
    launch_forward<T>(p, forward_of<T>(p, x, residual, source, y, nullptr), device.stream());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(Tensor grad_y, Tensor x, OptionalTensor kept,
                                                       OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                       Tensor invstd, bool training, std::string activation,
                                                       double negative_slope, bool need_x, bool need_residual,
                                                       bool need_affine) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd, "batch_norm_act_backward");
  const gpu::Device device(x);
  Tensor grad_x = core::empty_like_if(need_x, x), grad_residual = core::empty_like_if(need_residual, x);
  TwoVectors affine(p, x, need_affine);  // gradients of weight and bias
  if (x.numel() == 0) {
    affine.zero();
    return {grad_x, grad_residual, affine.first, affine.second};
  }
  const bool want_statistics = training && need_x;
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    using A = OpMath<T>;
    Backward<T> args{};
    args.gradient = gradient_of<T>(p, grad_y, x, kept);
    args.source = source_of<A>(mean, invstd, weight, bias);
    args.grad_x = wanted_data<T>(grad_x);
    args.grad_residual = wanted_data<T>(grad_residual);
    OptionalTensor memory;
    if (want_statistics || need_affine) {
      Reduce<T> sums{};
      sums.gradient = args.gradient;
      sums.source = args.source;
      sums.grad_weight = wanted_data<A>(affine.first);
      sums.grad_bias = wanted_data<A>(affine.second);
      if (want_statistics && launch_persistent_backward(p, x, sums, args, device.stream())) return;
      memory = launch_reduce<T>(p, x, sums, device.stream());
      if (want_statistics) args.mean_grad = sums.mean_grad, args.slope_grad = sums.slope_grad;
    }
    if (need_x || need_residual) launch_backward<T>(p, args, device.stream());
  });
  return {grad_x, grad_residual, affine.first, affine.second};
}

// ---- where several processes share a batch: sync.cpp tells what the ops are for -------------------------------------

Tensor statistics_of(Tensor x) {
  const BatchNormActShape p = shape_on_gpu(x, "identity", 0);
  const gpu::Device device(x);
  Tensor part = doubles(2 * p.channels + 1, x);
  if (x.numel() == 0) return torch::stable::zero_(part);
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    Statistics<T> args{};
    args.part = output<double>(part);
    launch_statistics<T>(p, x, args, device.stream());
  });
  return part;
}

std::tuple<Tensor, Tensor, Tensor> merge_of(Tensor x, Tensor gathered, OptionalTensor running_mean,
                                            OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                            std::optional<double> momentum, double eps) {
  const BatchNormActShape p = shape_on_gpu(x, "identity", 0);
  check_merge(p, x, gathered, running_mean, running_var, num_batches_tracked);
  const gpu::Device device(x);
  TwoVectors found(p, x);  // mean and invstd
  Tensor total = doubles(1, x);
  int64_t* const counter = output<int64_t>(num_batches_tracked);
  launch_count(counter, device.stream());  // by a kernel of its own: all blocks of the next one read the counter
  const auto launch_merge = [&]<class A>() {
    Merge<A> args{};
    args.gathered = input<double>(gathered);
    args.parts = int(gathered.size(0));
    args.channels = int(p.channels);
    args.mean = output<A>(found.first);
    args.invstd = output<A>(found.second);
    args.count = output<double>(total);
    args.running = {output<A>(running_mean), output<A>(running_var)};
    args.num_batches_tracked = momentum.has_value() ? nullptr : counter;
    args.factor = momentum.value_or(0);
    args.eps = eps;
    gpu::launch("batch_norm_act_merge", merge<A>, up(p.channels + 1, kThreads), kThreads, device.stream(), args);
  };
  p.dtype == DataType::f64 ? launch_merge.template operator()<double>() : launch_merge.template operator()<float>();
  return {found.first, found.second, total};
}

std::tuple<Tensor, Tensor, Tensor> reduce_of(Tensor grad_y, Tensor x, OptionalTensor kept, OptionalTensor weight,
                                             OptionalTensor bias, Tensor mean, Tensor invstd, std::string activation,
                                             double negative_slope, bool need_affine) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd, "batch_norm_act_reduce");
  const gpu::Device device(x);
  Tensor sums = doubles(2 * p.channels, x);
  TwoVectors affine(p, x, need_affine);  // gradients of weight and bias
  if (x.numel() == 0) {
    affine.zero();
    return {torch::stable::zero_(sums), affine.first, affine.second};
  }
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    Reduce<T> args{};
    args.gradient = gradient_of<T>(p, grad_y, x, kept);
    args.source = source_of<OpMath<T>>(mean, invstd, weight, bias);
    args.sums = output<double>(sums);
    args.grad_weight = wanted_data<OpMath<T>>(affine.first);
    args.grad_bias = wanted_data<OpMath<T>>(affine.second);
    launch_reduce<T>(p, x, args, device.stream());
  });
  return {sums, affine.first, affine.second};
}

std::tuple<Tensor, Tensor> input_grad_of(Tensor grad_y, Tensor x, OptionalTensor kept, OptionalTensor weight,
                                         OptionalTensor bias, Tensor mean, Tensor invstd, Tensor sums, Tensor count,
                                         std::string activation, double negative_slope, bool need_residual) {
  const BatchNormActShape p = shape_on_gpu(x, activation, negative_slope);
  check_input_grad(p, x, grad_y, kept, weight, bias, mean, invstd, sums, count);
  const gpu::Device device(x);
  Tensor grad_x = core::empty_like(x), grad_residual = core::empty_like_if(need_residual, x);
  if (x.numel() == 0) return {grad_x, grad_residual};
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    using A = OpMath<T>;
    const Tensor both = core::empty_vector(2 * p.channels, core::opmath_scalar_type(p.dtype), x);
    A *const mean_grad = output<A>(both), *const slope_grad = mean_grad + p.channels;
    gpu::launch("batch_norm_act_mean_gradients", mean_gradients<A>, up(p.channels, kThreads), kThreads, device.stream(),
                MeanGradients<A>{input<double>(sums), input<double>(count), input<A>(invstd), mean_grad, slope_grad,
                                 int(p.channels)});
    Backward<T> args{};
    args.gradient = gradient_of<T>(p, grad_y, x, kept);
    args.source = source_of<A>(mean, invstd, weight, bias);
    args.mean_grad = mean_grad;
    args.slope_grad = slope_grad;
    args.grad_x = output<T>(grad_x);
    args.grad_residual = wanted_data<T>(grad_residual);
    launch_backward<T>(p, args, device.stream());
  });
  return {grad_x, grad_residual};
}

}  // namespace
}  // namespace deepops::isa_gpu

DEEPOPS_GPU_LIBRARY_IMPL(m) {
  m.impl("batch_norm_act_train", TORCH_BOX(&deepops::isa_gpu::train));
  m.impl("batch_norm_act_eval", TORCH_BOX(&deepops::isa_gpu::eval));
  m.impl("batch_norm_act_backward", TORCH_BOX(&deepops::isa_gpu::backward_of));
  m.impl("batch_norm_act_statistics", TORCH_BOX(&deepops::isa_gpu::statistics_of));
  m.impl("batch_norm_act_merge", TORCH_BOX(&deepops::isa_gpu::merge_of));
  m.impl("batch_norm_act_reduce", TORCH_BOX(&deepops::isa_gpu::reduce_of));
  m.impl("batch_norm_act_input_grad", TORCH_BOX(&deepops::isa_gpu::input_grad_of));
}
