// batch_norm_act on the CPU: checks, geometry, allocation, the order of the passes, registration.
//
// Each pass is one parallel region. Large planar data takes a single one for both: statistics and elementwise work of a
// few channels follow each other while their planes are in the cache. Measured on 2 cores with 1 MB of level-2 cache:
// 1.2x at 50 MB forward and backward, but 0.75x at 6 MB, where streaming through memory in order is faster.
#include "batch_norm_act/batch_norm_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <string>
#include <tuple>

#include "batch_norm_act/host.h"
#include "batch_norm_act/per_channel.h"
#include "core/allocate.h"
#include "core/checks.h"
#include "core/memory_pool.h"
#include "core/parallel.h"

namespace deepops {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kValuesPerThread = 8192;   // less work than this does not pay for waking a thread
constexpr int64_t kTogetherAbove = 1 << 21;  // planar values that the cache will not hold from one pass to the next
constexpr int64_t kStreamAbove = 16 << 20;   // bytes of an elementwise pass that do not stay in the cache anyway
constexpr int64_t kFreshAbove = 32 << 20;    // bytes of a tensor that the C library takes from the kernel, page by page
constexpr int64_t kRowTurn = 256;            // columns above which large data is taken row by row
constexpr int64_t kValuesPerBlock = 65536;   // channels that go through both passes together, half a level-2 cache
// Additions in single precision before a sum goes to double. The terms of a gradient cancel: their errors show sooner.
constexpr int kStatisticsFlush = 32, kGradientFlush = 16;
constexpr int64_t kValuesPerPiece = 32768;  // one work item of a statistics pass

const BatchNormActKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(batch_norm_act_kernels); }

BatchNormActProblem problem_of(const Tensor& x, const std::string& activation, double negative_slope,
                               int flush = kStatisticsFlush) {
  core::check_cpu(x, "batch_norm_act", "x");
  BatchNormActProblem p{};
  static_cast<BatchNormActShape&>(p) = shape_of(x, activation, negative_slope);
  if (x.numel() == 0) return p;

  const int64_t count = p.count();
  p.flush = p.exact ? 1 : p.dtype <= DataType::f64 ? flush : std::min(flush, 8);
  p.planar = !p.channels_adjacent && p.inner >= kLanes;
  if (p.planar) {
    p.pieces = std::min(p.batch, std::max<int64_t>(1, count / kValuesPerPiece));
    return p;
  }
  p.group = p.channels_adjacent ? 1 : p.inner;
  p.period = p.channels * p.group;
  p.columns = p.period * (kLanes / std::gcd(p.period, kLanes));
  p.rows = x.numel() / p.columns;
  p.rows_at_once = p.columns >= kRowTurn && x.numel() > kTogetherAbove ? 1 : 4;
  p.tail = x.numel() % p.columns;
  const int64_t pieces = std::clamp<int64_t>(x.numel() / kValuesPerPiece, 8, std::max<int64_t>(8, p.rows / kLanes));
  p.rows_per_piece = std::max((p.rows + pieces - 1) / pieces, std::min(kLanes, p.rows));
  p.pieces = p.rows == 0 ? 0 : (p.rows + p.rows_per_piece - 1) / p.rows_per_piece;
  return p;
}

// Whether an elementwise pass over `tensors` tensors like x, some of them results, stores past the caches. Measured on
// 13 MB of x, forward: 2.6 ns for 16 values against 4.5 ns; on 6 MB, which stays in the cache, 2.4 ns against 1.7 ns.
bool streams(const BatchNormActProblem& p, const Tensor& x, int tensors, std::initializer_list<const void*> results) {
  if (p.dtype > DataType::f64 || (p.planar && p.inner % kLanes != 0)) return false;
  for (const void* data : results)
    if (reinterpret_cast<uintptr_t>(data) % 64 != 0) return false;
  const int64_t bytes = x.numel() * (p.dtype == DataType::f64 ? 8 : 4);
  return tensors * bytes > kStreamAbove && bytes < kFreshAbove;
}

// ---- the walk over the work items -----------------------------------------------------------------------------------

int64_t grain(int64_t values_per_item) {
  return std::max<int64_t>(1, kValuesPerThread / std::max<int64_t>(1, values_per_item));
}

// Runs `prepare(begin, end)` over channels, `sum(begin, end)` over the summing items, `finish(begin, end)` over
// channels, `each(begin, end)` over the elementwise items. sums: null if there is nothing to sum.
template <class Prepare, class Sum, class Finish, class Each>
void run(const BatchNormActProblem& p, Sums* sums, bool want_each, const Prepare& prepare, const Sum& sum,
         const Finish& finish, const Each& each) {
  const int64_t values = p.batch * p.channels * p.inner;
  const bool enough_channels = p.channels >= 4 * int64_t(torch::stable::get_num_threads());
  if (p.planar && sums && want_each && values > kTogetherAbove && enough_channels) {
    const int64_t per_block = std::max<int64_t>(1, kValuesPerBlock / (values / p.channels));
    core::parallel_for(p.channels, grain(values / p.channels), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; c += per_block) {
        const int64_t last = std::min(c + per_block, end);
        prepare(c, last);
        sum(c * p.pieces, last * p.pieces);
        finish(c, last);
        each(c * p.batch, last * p.batch);
      }
    });
    return;
  }
  const int64_t sum_items = p.planar ? p.channels * p.pieces : row_items(p);
  const int64_t each_items = p.planar ? p.channels * p.batch : row_items(p);
  if (sums) {
    prepare(0, p.channels);
    core::parallel_for(sum_items, grain(values / sum_items), sum);
    sums->add_pieces();
    finish(0, p.channels);
  }
  if (want_each) core::parallel_for(each_items, grain(values / each_items), each);
}

// ---- forward --------------------------------------------------------------------------------------------------------

// Statistics of one channel in double, two passes, for values whose squares do not fit single precision.
std::pair<double, double> careful_statistics(const BatchNormActProblem& p, const void* x, int64_t channel) {
  const int64_t count = p.count();
  const auto value = [&](int64_t i) {
    const int64_t n = i / p.inner, l = i % p.inner;
    const int64_t at = p.next_channel == 1 ? i * p.channels + channel : (n * p.channels + channel) * p.inner + l;
    return p.dtype == DataType::f64 ? static_cast<const double*>(x)[at] : double(static_cast<const float*>(x)[at]);
  };
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < count; ++i) mean += value(i) / double(count);
  for (int64_t i = 0; i < count; ++i) squares += (value(i) - mean) * (value(i) - mean) / double(count);
  return {mean, squares};
}

std::tuple<Tensor, Tensor, Tensor> train_cpu(Tensor x, OptionalTensor residual, OptionalTensor weight,
                                             OptionalTensor bias, OptionalTensor running_mean,
                                             OptionalTensor running_var, OptionalTensor num_batches_tracked,
                                             std::optional<double> momentum, double eps, std::string activation,
                                             double negative_slope) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope);
  check_train(p, x, residual, weight, bias, running_mean, running_var, num_batches_tracked);
  const ScalarType stat_type = core::opmath_scalar_type(p.dtype);
  Tensor mean = core::empty_vector(p.channels, stat_type, x);
  Tensor invstd = core::empty_vector(p.channels, stat_type, x);
  double factor = momentum.value_or(0);  // as torch: no update for momentum=None without a count
  if (num_batches_tracked.has_value()) {
    int64_t& batches = *static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
    ++batches;
    if (!momentum.has_value()) factor = 1.0 / double(batches);
  }
  if (x.numel() == 0) {  // no statistics to take; as in torch nothing is learnt from an empty batch
    torch::stable::zero_(mean);
    torch::stable::zero_(invstd);
    return {core::pooled_empty_like(x), mean, invstd};
  }

  const BatchNormActKernels& kernel = kernels();
  Scratch scratch;
  AffineNumbers affine(p, weight, bias, scratch);
  PerChannel shift(p, p.exact || p.dtype == DataType::f64, scratch);
  const Values shifts = scratch.take<double>(p.channels), sum = scratch.take<double>(p.channels);
  const Values squares = scratch.take<double>(p.channels), means = scratch.take<double>(p.channels);
  const Values variances = scratch.take<double>(p.channels);
  const Values running_means = read(running_mean, p.channels, 0, scratch);
  const Values running_vars = read(running_var, p.channels, 0, scratch);
  Sums sums(p, scratch);
  Tensor y = core::pooled_empty_like(x);
  BatchNormActForward args{};
  args.x = x.const_data_ptr();
  args.residual = core::data_or_null(residual);
  args.y = y.mutable_data_ptr();
  args.stream = streams(p, x, args.residual ? 3 : 2, {args.y});
  args.sums = sums.data();
  args.shift = shift.data();
  affine.give(args);
  void *mean_data = mean.mutable_data_ptr(), *invstd_data = invstd.mutable_data_ptr();
  void* running_mean_data = running_mean.has_value() ? running_mean->mutable_data_ptr() : nullptr;
  void* running_var_data = running_var.has_value() ? running_var->mutable_data_ptr() : nullptr;

  const int64_t count = p.count();
  const double per_count = 1 / double(count), unbiased = double(count) / double(count - 1);
  const auto prepare = [&](int64_t begin, int64_t end) {
    kernel.sample(p, args.x, begin, end, shifts.data() + begin);
    shift.set(shifts, begin, end);
  };
  const auto finish = [&](int64_t begin, int64_t end) {
    sums.read(begin, end, sum, squares);
    bool finite = true;
    for (int64_t c = begin; c < end; ++c) {
      const double offset = sum[c] * per_count;
      means[c] = shifts[c] + offset;
      variances[c] = std::max(0.0, squares[c] * per_count - offset * offset);
      finite &= squares[c] - squares[c] == 0;
    }
    for (int64_t c = begin; c < end && !finite; ++c)
      if (!std::isfinite(squares[c]) && p.dtype <= DataType::f64)
        std::tie(means[c], variances[c]) = careful_statistics(p, args.x, c);
    for (int64_t c = begin; c < end; ++c) {
      running_means[c] = (1 - factor) * running_means[c] + factor * means[c];
      running_vars[c] = (1 - factor) * running_vars[c] + factor * unbiased * variances[c];
      variances[c] = 1 / std::sqrt(variances[c] + eps);  // from here on the inverse standard deviation
    }
    if (running_mean_data) write(*running_mean, running_mean_data, running_means, begin, end);
    if (running_var_data) write(*running_var, running_var_data, running_vars, begin, end);
    write(mean, mean_data, means, begin, end);
    write(invstd, invstd_data, variances, begin, end);
    affine.set(means, variances, begin, end);
  };
  const auto statistics = [&](int64_t begin, int64_t end) { kernel.statistics(p, args, begin, end); };
  const auto forward = [&](int64_t begin, int64_t end) { kernel.forward(p, args, begin, end); };
  run(p, &sums, true, prepare, statistics, finish, forward);
  return {y, mean, invstd};
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
  const auto nothing = [](int64_t, int64_t) {};
  run(p, nullptr, true, nothing, nothing, nothing,
      [&](int64_t begin, int64_t end) { kernel.forward(p, args, begin, end); });
  return y;
}

// ---- backward -------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(Tensor grad_y, Tensor x, OptionalTensor kept,
                                                        OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                        Tensor invstd, bool training, std::string activation,
                                                        double negative_slope, bool need_x, bool need_residual,
                                                        bool need_affine) {
  const BatchNormActProblem p = problem_of(x, activation, negative_slope, kGradientFlush);
  const ScalarType stat_type = core::opmath_scalar_type(p.dtype);
  check_backward(p, x, grad_y, kept, weight, bias, mean, invstd);
  const auto like_x = [&](bool wanted) {
    return wanted ? core::pooled_empty_like(x) : core::empty_vector(0, x.scalar_type(), x);
  };
  Tensor grad_weight = core::empty_vector(need_affine ? p.channels : 0, stat_type, x);
  Tensor grad_bias = core::empty_vector(need_affine ? p.channels : 0, stat_type, x);
  if (x.numel() == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {like_x(need_x), like_x(need_residual), grad_weight, grad_bias};
  }

  Scratch scratch;
  const Values means = read(mean, p.channels, 0, scratch), invstds = read(invstd, p.channels, 1, scratch);
  AffineNumbers affine(p, weight, bias, scratch);
  affine.set(means, invstds, 0, p.channels);
  PerChannel mean_grad(p, scratch), slope_grad(p, scratch);
  const Values sum_g = scratch.take<double>(p.channels), sum_gx = scratch.take<double>(p.channels);
  const Values per_value = scratch.take<double>(p.channels);
  Sums sums(p, scratch);
  Tensor grad_x = like_x(need_x), grad_residual = like_x(need_residual);
  BatchNormActBackward args{};
  args.grad_y = grad_y.const_data_ptr();
  args.x = x.const_data_ptr();
  args.kept = p.activation == Activation::identity ? nullptr : core::data_or_null(kept);
  args.kept_is_output = derivative_from_output(p.activation, negative_slope);
  args.training = training;
  args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_residual = need_residual ? grad_residual.mutable_data_ptr() : nullptr;
  args.stream = streams(p, x, 2 + (args.kept != nullptr) + need_x + need_residual, {args.grad_x, args.grad_residual});
  args.mean_grad = mean_grad.data();
  args.slope_grad = slope_grad.data();
  args.sums = sums.data();
  affine.give(args);

  void *grad_weight_data = grad_weight.mutable_data_ptr(), *grad_bias_data = grad_bias.mutable_data_ptr();
  const double per_count = 1 / double(p.count());
  const auto nothing = [](int64_t, int64_t) {};
  const auto finish = [&](int64_t begin, int64_t end) {
    sums.read(begin, end, sum_g, sum_gx);
    for (int64_t c = begin; c < end; ++c) per_value[c] = sum_g[c] * per_count;
    mean_grad.set(per_value, begin, end);
    for (int64_t c = begin; c < end; ++c) per_value[c] = sum_gx[c] * per_count * invstds[c] * invstds[c];
    slope_grad.set(per_value, begin, end);
    if (!need_affine) return;
    for (int64_t c = begin; c < end; ++c) sum_gx[c] *= invstds[c];
    write(grad_weight, grad_weight_data, sum_gx, begin, end);
    write(grad_bias, grad_bias_data, sum_g, begin, end);
  };
  const BatchNormActKernels& kernel = kernels();
  const auto reduce = [&](int64_t begin, int64_t end) { kernel.reduce(p, args, begin, end); };
  const auto backward = [&](int64_t begin, int64_t end) { kernel.backward(p, args, begin, end); };
  const bool want_sums = need_affine || (training && need_x);
  run(p, want_sums ? &sums : nullptr, need_x || need_residual, nothing, reduce, finish, backward);
  return {grad_x, grad_residual, grad_weight, grad_bias};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("batch_norm_act_train", TORCH_BOX(&deepops::train_cpu));
  m.impl("batch_norm_act_eval", TORCH_BOX(&deepops::eval_cpu));
  m.impl("batch_norm_act_backward", TORCH_BOX(&deepops::backward_cpu));
}
