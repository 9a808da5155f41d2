// depthwise_bn_act on the CPU: checks, geometry, allocation, the order of the passes for channels_last, registration.
//
// Each pass is one parallel region. Contiguous data: see planar.cpp.
#include "depthwise_bn_act/depthwise_bn_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "batch_norm_act/per_channel.h"
#include "batch_norm_act/running.h"
#include "core/allocate.h"
#include "core/memory_pool.h"
#include "core/parallel.h"
#include "depthwise_bn_act/host.h"
#include "depthwise_bn_act/planar.h"

namespace deepops {
namespace {

constexpr int64_t kTile = DepthwiseProblem::kTile;
constexpr int64_t kMostGroups = 64, kFewItems = 32;  // work items: enough for the threads of a large machine
constexpr int64_t kLeastRows = 14;  // of a block: the backward computes up to R - 1 rows of its neighbours again
constexpr int64_t kInPlaceBelow = 1 << 21;  // values of y that stay in the cache from one pass to the next

const DepthwiseKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(depthwise_kernels); }

DepthwiseShape shape_on_cpu(const Tensor& x, const Tensor& filter, const Integers& stride, const Integers& padding,
                            const Integers& dilation, const std::string& activation, double negative_slope,
                            bool training = true) {
  core::check_cpu(x, "depthwise_bn_act", "x");
  return depthwise_shape_of(x, filter, stride, padding, dilation, activation, negative_slope, training);
}

DepthwiseProblem problem_of(const DepthwiseShape& shape) {
  DepthwiseProblem p{};
  static_cast<DepthwiseShape&>(p) = shape;
  p.tiles = (p.channels + kTile - 1) / kTile;
  p.image_groups = std::min(p.batch, kMostGroups);
  p.row_blocks = std::clamp<int64_t>(kFewItems / p.image_groups, 1, std::max<int64_t>(1, p.out_height / kLeastRows));
  p.ring_rows = (p.filter_height - 1) * p.dilation_y / p.stride_y + 2;
  return p;
}

// ---- numbers between tensors and kernels ----------------------------------------------------------------------------

// One per channel, by slot.
class BySlot {
 public:
  BySlot(const DepthwiseProblem& p, bool is_double, Scratch& scratch) : p_(p), is_double_(is_double) {
    is_double_ ? void(doubles_ = scratch.take<double>(p.slots())) : void(floats_ = scratch.take<float>(p.slots()));
  }
  BySlot(const DepthwiseProblem& p, const Values& values, Scratch& scratch)
      : BySlot(p, p.dtype == DataType::f64, scratch) {
    set(values);
  }
  void set(const Values& values) {
    for (int64_t slot = 0; slot < p_.slots(); ++slot) {
      const double value = values[p_.first_channel(slot / kTile) + slot % kTile];
      is_double_ ? void(doubles_[slot] = value) : void(floats_[slot] = static_cast<float>(value));
    }
  }
  const void* data() const { return is_double_ ? static_cast<const void*>(doubles_.data()) : floats_.data(); }

 private:
  const DepthwiseProblem& p_;
  const bool is_double_;
  std::span<float> floats_;
  std::span<double> doubles_;
};

// [C, 1, R, S] as the kernels read it, [tiles][R * S][16].
template <class S>
const S* pack(const DepthwiseProblem& p, const Tensor& filter, Scratch& scratch) {
  const std::span<S> packed = scratch.take<S>(p.slots() * p.filter_size());
  const auto* from = static_cast<const S*>(filter.const_data_ptr());
  const int64_t next_channel = filter.stride(0), next_row = filter.stride(2), next_column = filter.stride(3);
  S* to = packed.data();
  for (int64_t tile = 0; tile < p.tiles; ++tile)
    for (int64_t r = 0; r < p.filter_height; ++r)
      for (int64_t s = 0; s < p.filter_width; ++s)
        for (int64_t c = p.first_channel(tile), last = c + kTile; c < last; ++c)
          *to++ = from[c * next_channel + r * next_row + s * next_column];
  return packed.data();
}

const void* pack_any(const DepthwiseProblem& p, const Tensor& filter, Scratch& scratch) {
  return p.dtype == DataType::f64 ? static_cast<const void*>(pack<double>(p, filter, scratch))
                                  : pack<float>(p, filter, scratch);
}

template <class S>
void unpack(const DepthwiseProblem& p, const double* sums, const Tensor& filter, S* to) {
  const int64_t next_channel = filter.stride(0), next_row = filter.stride(2), next_column = filter.stride(3);
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t slot = p.slot(c);
    const double* from = sums + slot / kTile * kTile * p.filter_size() + slot % kTile;
    for (int64_t r = 0; r < p.filter_height; ++r)
      for (int64_t s = 0; s < p.filter_width; ++s, from += kTile)
        to[c * next_channel + r * next_row + s * next_column] = static_cast<S>(*from);
  }
}

// ---- passes ---------------------------------------------------------------------------------------------------------

// Threads that take part, and what each of them has for itself.
class Workers {
 public:
  Workers(const DepthwiseProblem& p, bool with_ring, Scratch& scratch) : p_(p) {
    count_ = core::workers_for(p.count() * p.channels, core::kValuesPerThread, p.items());
    taps_ = 2 * p.filter_size();
    ring_bytes_ = with_ring ? p.slots() * p.ring_rows * p.out_width * (p.dtype == DataType::f64 ? 8 : 4) : 0;
    all_taps_ = scratch.take<DepthwiseTap>(count_ * taps_);
    rings_ = scratch.take<std::byte>(count_ * ring_bytes_);
  }
  DepthwiseWorkspace workspace(int64_t worker) const {
    return {all_taps_.data() + worker * taps_, rings_.data() + worker * ring_bytes_};
  }
  // pass(workspace, begin, end) over all work items.
  template <class Pass>
  void run(const Pass& pass) const {
    core::divide(count_, p_.items(),
                 [&](int64_t worker, int64_t begin, int64_t end) { pass(workspace(worker), begin, end); });
  }

 private:
  const DepthwiseProblem& p_;
  int64_t count_, taps_, ring_bytes_;
  std::span<DepthwiseTap> all_taps_;
  std::span<std::byte> rings_;
};

// Both sums of every channel.
void read_sums(const DepthwiseProblem& p, const std::span<double>& sums, const Values& a, const Values& b) {
  add_items(sums, p.items());
  for (int64_t c = 0; c < p.channels; ++c) {
    a[c] = sums[p.slot(c)];
    b[c] = sums[p.slots() + p.slot(c)];
  }
}

// Means and biased variances of z.
void take_statistics(const DepthwiseProblem& p, DepthwiseForward args, const Workers& workers, const Values& means,
                     const Values& variances, Scratch& scratch) {
  const std::span<double> sums = scratch.take<double>(p.items() * 2 * p.slots());
  const Values near = scratch.take<double>(p.slots()), shifts = scratch.take<double>(p.channels);
  BySlot shift(p, p.exact || p.dtype == DataType::f64, scratch);
  args.sums = sums.data();
  kernels().sample(p, args, workers.workspace(0), near.data());
  for (int64_t c = 0; c < p.channels; ++c) shifts[c] = near[p.slot(c)];
  shift.set(shifts);
  args.shift = shift.data();
  workers.run([&](const DepthwiseWorkspace& workspace, int64_t begin, int64_t end) {
    kernels().statistics(p, args, workspace, begin, end);
  });
  read_sums(p, sums, means, variances);
  const double per_count = 1 / double(p.count());
  for (int64_t c = 0; c < p.channels; ++c) {
    const double offset = means[c] * per_count;
    means[c] = shifts[c] + offset;
    // Infinite where squares do not fit, NaN where z is not finite.
    const double squares = variances[c] * per_count;
    variances[c] = squares - squares == 0 ? std::max(0.0, squares - offset * offset) : squares;
  }
}

std::tuple<Tensor, Tensor, Tensor> train_cpu(Tensor x, Tensor conv_weight, OptionalTensor weight, OptionalTensor bias,
                                             OptionalTensor running_mean, OptionalTensor running_var,
                                             OptionalTensor num_batches_tracked, Integers stride, Integers padding,
                                             Integers dilation, std::optional<double> momentum, double eps,
                                             std::string activation, double negative_slope) {
  const DepthwiseShape shape = shape_on_cpu(x, conv_weight, stride, padding, dilation, activation, negative_slope);
  if (!shape.channels_adjacent)
    return depthwise_train_planes(shape, x, conv_weight, weight, bias, running_mean, running_var, num_batches_tracked,
                                  momentum, eps);
  const DepthwiseProblem p = problem_of(shape);
  check_train(p, x, {}, weight, bias, running_mean, running_var, num_batches_tracked);
  StoredVectors statistics(p, x);  // mean and invstd
  const double factor = count_batch(num_batches_tracked, momentum);

  Scratch scratch;
  const Workers workers(p, false, scratch);
  const Values means = scratch.take<double>(p.channels), variances = scratch.take<double>(p.channels);
  DepthwiseForward args{};
  args.x = x.const_data_ptr();
  args.filter = pack_any(p, conv_weight, scratch);
  const OutputLayout layout(p);
  Tensor y = core::pooled_empty(layout.sizes, layout.strides, x);
  args.y = y.mutable_data_ptr();
  args.in_place = p.dtype <= DataType::f64 && (p.stride_y * p.stride_x > 1 || y.numel() <= kInPlaceBelow);
  take_statistics(p, args, workers, means, variances, scratch);
  const auto finite = [](double value) { return std::isfinite(value); };
  if (!p.exact && !std::all_of(variances.begin(), variances.end(), finite)) {  // rare: squares above 1e38, or NaN
    DepthwiseProblem careful = p;
    careful.exact = true;
    const Values exact_means = scratch.take<double>(p.channels), exact_variances = scratch.take<double>(p.channels);
    take_statistics(careful, args, workers, exact_means, exact_variances, scratch);
    for (int64_t c = 0; c < p.channels; ++c)
      if (!std::isfinite(variances[c])) means[c] = exact_means[c], variances[c] = exact_variances[c];
  }

  RunningStatistics running(running_mean, running_var, p.channels, scratch);
  running.learn(means, variances, double(p.count()) / double(p.count() - 1), factor, 0, p.channels);
  to_invstd(variances, eps, 0, p.channels);
  statistics.set(means, variances, 0, p.channels);

  const Values scales = read(weight, p.channels, 1, scratch);
  for (int64_t c = 0; c < p.channels; ++c) scales[c] *= variances[c];
  const BySlot mean_numbers(p, means, scratch), scale_numbers(p, scales, scratch);
  const BySlot bias_numbers(p, read(bias, p.channels, 0, scratch), scratch);
  args.mean = mean_numbers.data();
  args.scale = scale_numbers.data();
  args.bias = bias_numbers.data();
  workers.run([&](const DepthwiseWorkspace& workspace, int64_t begin, int64_t end) {
    kernels().forward(p, args, workspace, begin, end);
  });
  return {y, statistics.first, statistics.second};
}

Tensor evaluate_cpu(Tensor x, Tensor conv_weight, Tensor bias, Integers stride, Integers padding, Integers dilation,
                    std::string activation, double negative_slope) {
  const DepthwiseProblem p =
      problem_of(shape_on_cpu(x, conv_weight, stride, padding, dilation, activation, negative_slope, false));
  check_affine(p, x, {}, bias, "depthwise_bn_act_eval");
  const OutputLayout layout(p);
  Tensor y = core::pooled_empty(layout.sizes, layout.strides, x);
  Scratch scratch;
  const Workers workers(p, false, scratch);
  DepthwiseForward args{};
  args.x = x.const_data_ptr();
  args.filter = pack_any(p, conv_weight, scratch);
  args.y = y.mutable_data_ptr();
  const BySlot mean(p, read({}, p.channels, 0, scratch), scratch), scale(p, read({}, p.channels, 1, scratch), scratch);
  const BySlot bias_numbers(p, read(bias, p.channels, 0, scratch), scratch);
  args.mean = mean.data();
  args.scale = scale.data();
  args.bias = bias_numbers.data();
  workers.run([&](const DepthwiseWorkspace& workspace, int64_t begin, int64_t end) {
    kernels().forward(p, args, workspace, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(Tensor grad_y, Tensor x, Tensor conv_weight,
                                                        OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                        Tensor invstd, Integers stride, Integers padding,
                                                        Integers dilation, std::string activation,
                                                        double negative_slope, bool need_x, bool need_conv_weight,
                                                        bool need_affine) {
  const DepthwiseShape shape = shape_on_cpu(x, conv_weight, stride, padding, dilation, activation, negative_slope);
  if (!shape.channels_adjacent)
    return depthwise_backward_planes(shape, grad_y, x, conv_weight, weight, bias, mean, invstd, need_x,
                                     need_conv_weight, need_affine);
  const DepthwiseProblem p = problem_of(shape);
  check_output(p, grad_y, x);
  check_affine(p, x, weight, bias, "depthwise_bn_act_backward");
  check_statistics(p, x, mean, invstd, "depthwise_bn_act_backward");
  Tensor grad_x = core::pooled_empty_like_if(need_x, x);
  Tensor grad_conv_weight = core::empty_like_if(need_conv_weight, conv_weight);
  StoredVectors affine(p, x, need_affine);  // gradients of weight and bias

  Scratch scratch;
  const Workers workers(p, need_x || need_conv_weight, scratch);
  const Values means = read(mean, p.channels, 0, scratch), invstds = read(invstd, p.channels, 1, scratch);
  const Values scales = read(weight, p.channels, 1, scratch);
  for (int64_t c = 0; c < p.channels; ++c) scales[c] *= invstds[c];
  const BySlot mean_numbers(p, means, scratch), scale_numbers(p, scales, scratch);
  const BySlot bias_numbers(p, read(bias, p.channels, 0, scratch), scratch);
  const std::span<double> sums = scratch.take<double>(p.items() * 2 * p.slots());
  DepthwiseBackward args{};
  args.grad_y = grad_y.const_data_ptr();
  args.x = x.const_data_ptr();
  args.filter = pack_any(p, conv_weight, scratch);
  args.mean = mean_numbers.data();
  args.scale = scale_numbers.data();
  args.bias = bias_numbers.data();
  args.sums = sums.data();
  workers.run([&](const DepthwiseWorkspace& workspace, int64_t begin, int64_t end) {
    kernels().reduce(p, args, workspace, begin, end);
  });
  const Values sum_g = scratch.take<double>(p.channels), sum_gz = scratch.take<double>(p.channels);
  read_sums(p, sums, sum_g, sum_gz);

  if (need_x || need_conv_weight) {
    const double per_count = 1 / double(p.count());
    const Values per_value = scratch.take<double>(p.channels);
    for (int64_t c = 0; c < p.channels; ++c) per_value[c] = sum_g[c] * per_count;
    const BySlot mean_grad(p, per_value, scratch);
    for (int64_t c = 0; c < p.channels; ++c) per_value[c] = sum_gz[c] * per_count * invstds[c] * invstds[c];
    const BySlot slope_grad(p, per_value, scratch);
    const auto filter_sums = scratch.take<double>(need_conv_weight ? p.items() * p.slots() * p.filter_size() : 0);
    args.mean_grad = mean_grad.data();
    args.slope_grad = slope_grad.data();
    args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
    args.grad_filter = need_conv_weight ? filter_sums.data() : nullptr;
    workers.run([&](const DepthwiseWorkspace& workspace, int64_t begin, int64_t end) {
      kernels().gradients(p, args, workspace, begin, end);
    });
    if (need_conv_weight) {
      add_items(filter_sums, p.items());
      void* const to = grad_conv_weight.mutable_data_ptr();
      p.dtype == DataType::f64 ? unpack(p, filter_sums.data(), conv_weight, static_cast<double*>(to))
                               : unpack(p, filter_sums.data(), conv_weight, static_cast<float*>(to));
    }
  }
  for (int64_t c = 0; c < p.channels; ++c) sum_gz[c] *= invstds[c];
  affine.set(sum_gz, sum_g, 0, p.channels);
  return {grad_x, grad_conv_weight, affine.first, affine.second};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("depthwise_bn_act_train", TORCH_BOX(&deepops::train_cpu));
  m.impl("depthwise_bn_act_eval", TORCH_BOX(&deepops::evaluate_cpu));
  m.impl("depthwise_bn_act_backward", TORCH_BOX(&deepops::backward_cpu));
}
