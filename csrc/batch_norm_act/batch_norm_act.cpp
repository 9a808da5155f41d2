// batch_norm_act on the CPU: checks, allocation, the order of the passes (passes.h), registration.
#include "batch_norm_act/batch_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "batch_norm_act/passes.h"

namespace deepops {
namespace {

std::tuple<Tensor, Tensor, Tensor> train_cpu(Tensor x, OptionalTensor residual, OptionalTensor weight,
                                             OptionalTensor bias, OptionalTensor running_mean,
                                             OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                             std::optional<double> momentum, double eps, std::string activation,
                                             double negative_slope) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope);
  check_train(p, x, residual, weight, bias, running_mean, running_var, num_batches_tracked);
  StoredVectors statistics(p, x);  // mean and invstd
  const double factor = count_batch(num_batches_tracked, momentum);
  if (x.numel() == 0) {  // no statistics to take; as in torch nothing is learnt from an empty batch
    statistics.zero();
    return {core::pooled_empty_like(x), statistics.first, statistics.second};
  }

  const BatchNormActKernels& kernel = kernels();
  Scratch scratch;
  AffineNumbers affine(p, weight, bias, scratch);
  BatchMoments moments(p, x, scratch);
  RunningStatistics running(running_mean, running_var, p.channels, scratch);
  Tensor y = core::pooled_empty_like(x);
  BatchNormActForward args{};
  moments.give(args);
  affine.give(args);
  args.residual = core::data_or_null(residual);
  args.y = y.mutable_data_ptr();
  args.stream = streams(p, x, args.residual ? 3 : 2, {args.y});

  const double count = double(p.count()), unbiased = count / (count - 1);
  const auto prepare = [&](int64_t begin, int64_t end) { moments.prepare(begin, end); };
  const auto finish = [&](int64_t begin, int64_t end) {
    moments.finish(begin, end);
    running.learn(moments.means, moments.variances, unbiased, factor, begin, end);
    to_invstd(moments.variances, eps, begin, end);
    statistics.set(moments.means, moments.variances, begin, end);
    affine.set(moments.means, moments.variances, begin, end);
  };
  const auto sum = [&](int64_t begin, int64_t end) { kernel.statistics(p, args, begin, end); };
  const auto forward = [&](int64_t begin, int64_t end) { kernel.forward(p, args, begin, end); };
  run(p, &moments.sums(), true, prepare, sum, finish, forward);
  return {y, statistics.first, statistics.second};
}

Tensor eval_cpu(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, Tensor mean,
                Tensor invstd, std::string activation, double negative_slope) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope);
  check_eval(p, x, residual, weight, bias, mean, invstd);
  if (x.numel() == 0) return core::pooled_empty_like(x);
  Scratch scratch;
  AffineNumbers affine(p, weight, bias, scratch);
  affine.set(read(mean, p.channels, 0, scratch), read(invstd, p.channels, 1, scratch), 0, p.channels);
  Tensor y = core::pooled_empty_like(x);
  BatchNormActForward args{};
  args.x = x.const_data_ptr();
  args.residual = core::data_or_null(residual);
  args.y = y.mutable_data_ptr();
  args.stream = streams(p, x, args.residual ? 3 : 2, {args.y});
  affine.give(args);
  const BatchNormActKernels& kernel = kernels();
  run(p, nullptr, true, nothing, nothing, nothing,
      [&](int64_t begin, int64_t end) { kernel.forward(p, args, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(Tensor grad_y, Tensor x, OptionalTensor kept,
                                                        OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                        Tensor invstd, bool training, std::string activation,
                                                        double negative_slope, bool need_x, bool need_residual,
                                                        bool need_affine) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope, kGradientFlush);
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd, "batch_norm_act_backward");
  StoredVectors affine(p, x, need_affine);  // gradients of weight and bias
  Tensor grad_x = core::pooled_empty_like_if(need_x, x), grad_residual = core::pooled_empty_like_if(need_residual, x);
  if (x.numel() == 0) {
    affine.zero();
    return {grad_x, grad_residual, affine.first, affine.second};
  }

  Scratch scratch;
  GradientPass pass(p, grad_y, x, kept, weight, bias, mean, invstd, scratch);
  pass.set_results(p, x, grad_x, grad_residual);
  pass.args.training = training;
  const Values sum_g = scratch.take<double>(p.channels), sum_gx = scratch.take<double>(p.channels);
  Sums sums(p, scratch);
  pass.args.sums = sums.data();
  const double per_count = 1 / double(p.count());
  const auto finish = [&](int64_t begin, int64_t end) {
    sums.read(begin, end, sum_g, sum_gx);
    pass.set_sums(sum_g, sum_gx, per_count, begin, end);
    pass.set_affine(affine, sum_g, sum_gx, begin, end);
  };
  const BatchNormActKernels& kernel = kernels();
  const auto reduce = [&](int64_t begin, int64_t end) { kernel.reduce(p, pass.args, begin, end); };
  const auto backward = [&](int64_t begin, int64_t end) { kernel.backward(p, pass.args, begin, end); };
  const bool want_sums = need_affine || (training && need_x);
  run(p, want_sums ? &sums : nullptr, need_x || need_residual, nothing, reduce, finish, backward);
  return {grad_x, grad_residual, affine.first, affine.second};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("batch_norm_act_train", TORCH_BOX(&deepops::train_cpu));
  m.impl("batch_norm_act_eval", TORCH_BOX(&deepops::eval_cpu));
  m.impl("batch_norm_act_backward", TORCH_BOX(&deepops::backward_cpu));
}
