// conv_bn_act on CUDA: allocation, arguments, registration. The choice of the kernel: gpu_launches.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "conv_bn_act/gpu_launches.h"
#include "conv_bn_act/host.h"

namespace deepops::isa_gpu {
namespace {

constexpr int kLeastCapability = 8;

ConvProblem problem_on_gpu(const Tensor& x, const Tensor& conv_weight, const Integers& stride, const Integers& padding,
                           const Integers& dilation, const char* op) {
  STD_TORCH_CHECK(gpu::on_gpu(x), op, ": x must be on the GPU");
  const ConvProblem p = conv_problem_of(x, conv_weight, stride, padding, dilation, op);
  const gpu::Device device(x);
  const int major = gpu::major_capability();
  STD_TORCH_CHECK(major >= kLeastCapability, op, ": the GPU has compute capability ", major,
                  ".x; needed: ", kLeastCapability, ".0");
  return p;
}

// float, core::Half and core::BFloat16 only: conv_problem_of() has refused the rest.
template <class Call>
void with_type(DataType type, const Call& call) {
  switch (type) {
    case DataType::f16:
      return call.template operator()<core::Half>();
    case DataType::bf16:
      return call.template operator()<core::BFloat16>();
    default:
      return call.template operator()<float>();
  }
}

template <class T>
ConvArguments<T> arguments_of(const ConvProblem& p, const Tensor& x, const Tensor& conv_weight, const Tensor& y) {
  ConvArguments<T> args{};
  args.problem = p;
  args.x = input<T>(x);
  args.weight = input<T>(conv_weight);
  args.y = output<T>(y);
  return args;
}

Tensor eval(Tensor x, Tensor conv_weight, OptionalTensor residual, Tensor scale, Tensor shift, Integers stride,
            Integers padding, Integers dilation, std::string activation, double negative_slope) {
  constexpr const char* kOp = "conv_bn_act_eval";
  const ConvProblem p = problem_on_gpu(x, conv_weight, stride, padding, dilation, kOp);
  check_conv_eval(p, x, residual, scale, shift, kOp);
  const Activation act = activation_of(activation);
  const gpu::Device device(x);
  const ConvOutputLayout layout(p);
  Tensor y = core::empty(layout.sizes, layout.strides, x);
  if (p.rows() == 0) return y;
  with_type(p.dtype, [&]<class T>() {
    ConvArguments<T> args = arguments_of<T>(p, x, conv_weight, y);
    args.residual = input<T>(residual);
    args.scale = input<float>(scale);
    args.shift = input<float>(shift);
    args.activation = act;
    args.negative_slope = negative_slope;
    launch_convolution<T, ConvResult::evaluation>(args, x, device.stream());
  });
  return y;
}

// One thread: what is left of a step without data.
DEEPOPS_KERNEL(1) count_conv_batch(int64_t* num_batches_tracked) {
  gpu::store(num_batches_tracked, gpu::load(num_batches_tracked) + 1);
}

std::tuple<Tensor, Tensor, Tensor> statistics_of(Tensor x, Tensor conv_weight, OptionalTensor running_mean,
                                                 OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                                 Integers stride, Integers padding, Integers dilation,
                                                 std::optional<double> momentum, double eps) {
  constexpr const char* kOp = "conv_bn_act_statistics";
  const ConvProblem p = problem_on_gpu(x, conv_weight, stride, padding, dilation, kOp);
  check_conv_statistics(p, x, running_mean, running_var, num_batches_tracked, kOp);
  const gpu::Device device(x);
  const ConvOutputLayout layout(p);
  Tensor z = core::empty(layout.sizes, layout.strides, x);
  Tensor mean = core::empty_vector(p.out_channels, ScalarType::Float, x);
  Tensor invstd = core::empty_vector(p.out_channels, ScalarType::Float, x);
  int64_t* const counter = output<int64_t>(num_batches_tracked);
  if (p.rows() == 0) {  // as in torch nothing is learnt from an empty batch
    torch::stable::zero_(mean);
    torch::stable::zero_(invstd);
    if (counter) gpu::launch("conv_bn_act_count", count_conv_batch, 1, 1, device.stream(), counter);
    return {z, mean, invstd};
  }
  with_type(p.dtype, [&]<class T>() {
    ConvArguments<T> args = arguments_of<T>(p, x, conv_weight, z);
    args.statistics.mean = output<float>(mean);
    args.statistics.invstd = output<float>(invstd);
    args.statistics.running = {output<float>(running_mean), output<float>(running_var)};
    args.statistics.num_batches_tracked = counter;
    args.statistics.cumulative = !momentum.has_value() && counter;
    args.statistics.factor = momentum.value_or(0);  // as torch: no update for momentum=None without a count
    args.statistics.eps = eps;
    launch_convolution<T, ConvResult::statistics>(args, x, device.stream());
  });
  return {z, mean, invstd};
}

}  // namespace
}  // namespace deepops::isa_gpu

DEEPOPS_GPU_LIBRARY_IMPL(m) {
  m.impl("conv_bn_act_eval", TORCH_BOX(&deepops::isa_gpu::eval));
  m.impl("conv_bn_act_statistics", TORCH_BOX(&deepops::isa_gpu::statistics_of));
}
