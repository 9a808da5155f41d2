// batch_norm_act on the CPU where several processes share a batch: its ops, cut in two where the processes talk.
//
//   batch_norm_act_statistics   what a process has to say of its part                    (one vector to be gathered)
//   batch_norm_act_merge        mean and invstd of the whole batch; running statistics   (then batch_norm_act_eval)
//   batch_norm_act_reduce       the sums of a backward over this part                    (one vector to be added up)
//   batch_norm_act_input_grad   grad_x from the sums over the whole batch
//
// The passes are those of batch_norm_act.cpp. What is collective is none of their business: deepops/_sync.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "batch_norm_act/moments.h"
#include "batch_norm_act/passes.h"

namespace deepops {
namespace {

Tensor doubles(int64_t count, const Tensor& like) { return core::empty_vector(count, ScalarType::Double, like); }

Values values_of(const Tensor& tensor, int64_t first, int64_t count) {
  return {static_cast<double*>(tensor.mutable_data_ptr()) + first, size_t(count)};
}

Tensor statistics_cpu(Tensor x) {
  const BatchNormActProblem p = problem_of(x, "identity", 0);
  Tensor result = doubles(2 * p.channels + 1, x);
  if (x.numel() == 0) return torch::stable::zero_(result);
  Scratch scratch;
  BatchMoments moments(p, x, scratch);
  BatchNormActForward args{};
  moments.give(args);
  const BatchNormActKernels& kernel = kernels();
  const auto prepare = [&](int64_t begin, int64_t end) { moments.prepare(begin, end); };
  const auto sum = [&](int64_t begin, int64_t end) { kernel.statistics(p, args, begin, end); };
  const auto finish = [&](int64_t begin, int64_t end) { moments.finish(begin, end); };
  run(p, &moments.sums(), false, prepare, sum, finish, nothing);
  std::copy_n(moments.means.begin(), p.channels, values_of(result, 0, p.channels).begin());
  std::copy_n(moments.variances.begin(), p.channels, values_of(result, p.channels, p.channels).begin());
  values_of(result, 2 * p.channels, 1)[0] = double(p.count());
  return result;
}

std::tuple<Tensor, Tensor, Tensor> merge_cpu(Tensor x, Tensor gathered, OptionalTensor running_mean,
                                             OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                             std::optional<double> momentum, double eps) {
  const BatchNormActProblem p = problem_of(x, "identity", 0);
  check_merge(p, x, gathered, running_mean, running_var, num_batches_tracked);
  StoredVectors statistics(p, x);  // mean and invstd
  Tensor count = doubles(1, x);
  const double factor = count_batch(num_batches_tracked, momentum);
  const int64_t parts = gathered.size(0), width = 2 * p.channels + 1;
  const auto* from = static_cast<const double*>(gathered.const_data_ptr());
  double total = 0;
  for (int64_t i = 0; i < parts; ++i) total += from[i * width + 2 * p.channels];
  values_of(count, 0, 1)[0] = total;
  if (total == 0) {
    statistics.zero();
    return {statistics.first, statistics.second, count};
  }

  Scratch scratch;
  const Values means = scratch.take<double>(p.channels), variances = scratch.take<double>(p.channels);
  RunningStatistics running(running_mean, running_var, p.channels, scratch);
  core::parallel_for(p.channels, grain(parts), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      JoinedMoments joined;
      for (const double* part = from; part < from + parts * width; part += width)
        joined.add(part[2 * p.channels], part[c], part[p.channels + c]);
      means[c] = joined.mean;
      variances[c] = joined.variance;
    }
    if (total > 1) running.learn(means, variances, total / (total - 1), factor, begin, end);
    to_invstd(variances, eps, begin, end);
    statistics.set(means, variances, begin, end);
  });
  return {statistics.first, statistics.second, count};
}

std::tuple<Tensor, Tensor, Tensor> reduce_cpu(Tensor grad_y, Tensor x, OptionalTensor kept, OptionalTensor weight,
                                              OptionalTensor bias, Tensor mean, Tensor invstd, std::string activation,
                                              double negative_slope, bool need_affine) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope, kGradientFlush);
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd, "batch_norm_act_reduce");
  StoredVectors affine(p, x, need_affine);  // gradients of weight and bias
  Tensor result = doubles(2 * p.channels, x);
  if (x.numel() == 0) {
    affine.zero();
    return {torch::stable::zero_(result), affine.first, affine.second};
  }
  Scratch scratch;
  GradientPass pass(p, grad_y, x, kept, weight, bias, mean, invstd, scratch);
  const Values sum_g = scratch.take<double>(p.channels), sum_gx = scratch.take<double>(p.channels);
  Sums sums(p, scratch);
  pass.args.sums = sums.data();
  const BatchNormActKernels& kernel = kernels();
  const auto reduce = [&](int64_t begin, int64_t end) { kernel.reduce(p, pass.args, begin, end); };
  const auto finish = [&](int64_t begin, int64_t end) { sums.read(begin, end, sum_g, sum_gx); };
  run(p, &sums, false, nothing, reduce, finish, nothing);
  std::copy_n(sum_g.begin(), p.channels, values_of(result, 0, p.channels).begin());
  std::copy_n(sum_gx.begin(), p.channels, values_of(result, p.channels, p.channels).begin());
  pass.set_affine(affine, sum_g, sum_gx, 0, p.channels);
  return {result, affine.first, affine.second};
}

std::tuple<Tensor, Tensor> input_grad_cpu(Tensor grad_y, Tensor x, OptionalTensor kept, OptionalTensor weight,
                                          OptionalTensor bias, Tensor mean, Tensor invstd, Tensor sums, Tensor count,
                                          std::string activation, double negative_slope, bool need_residual) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope, kGradientFlush);
  check_input_grad(p, x, grad_y, kept, weight, bias, mean, invstd, sums, count);
  Tensor grad_x = core::pooled_empty_like(x), grad_residual = core::pooled_empty_like_if(need_residual, x);
  if (x.numel() == 0) return {grad_x, grad_residual};
  Scratch scratch;
  GradientPass pass(p, grad_y, x, kept, weight, bias, mean, invstd, scratch);
  pass.set_results(p, x, grad_x, grad_residual);
  pass.args.training = true;
  const Values sum_g = read(sums, 2 * p.channels, 0, scratch);
  pass.set_sums(sum_g, sum_g.subspan(size_t(p.channels)), 1 / read(count, 1, 1, scratch)[0], 0, p.channels);
  const BatchNormActKernels& kernel = kernels();
  run(p, nullptr, true, nothing, nothing, nothing,
      [&](int64_t begin, int64_t end) { kernel.backward(p, pass.args, begin, end); });
  return {grad_x, grad_residual};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("batch_norm_act_statistics", TORCH_BOX(&deepops::statistics_cpu));
  m.impl("batch_norm_act_merge", TORCH_BOX(&deepops::merge_cpu));
  m.impl("batch_norm_act_reduce", TORCH_BOX(&deepops::reduce_cpu));
  m.impl("batch_norm_act_input_grad", TORCH_BOX(&deepops::input_grad_cpu));
}
