// depthwise_bn_act of contiguous data on the CPU: geometry, allocation, the order of the passes.
//
// One parallel region each way: channels do not know of each other, and a thread finishes one before it takes the next.
#include "depthwise_bn_act/planar.h"

#include <algorithm>
#include <cmath>

#include "batch_norm_act/per_channel.h"
#include "batch_norm_act/running.h"
#include "core/memory_pool.h"
#include "core/parallel.h"
#include "depthwise_bn_act/planes.h"

namespace deepops {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kValuesAtOnce = 1 << 16;  // that a thread works on: a part of the second-level cache
constexpr int64_t kInPlaceBelow = 1 << 17;  // values of a channel that stay in the cache from one pass to the next

const DepthwisePlanarKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(depthwise_planar_kernels); }

// ---- geometry -------------------------------------------------------------------------------------------------------

int64_t up(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }
int64_t in_lanes(int64_t count) { return up(count, kLanes) * kLanes; }

// taps, grad_taps: [R * S]
DepthwisePlanes planes_of(const DepthwiseShape& shape, std::span<PlanarTap> taps, std::span<PlanarTap> grad_taps) {
  DepthwisePlanes p{};
  static_cast<DepthwiseShape&>(p) = shape;
  const int64_t reach_y = (p.filter_height - 1) * p.dilation_y, reach_x = (p.filter_width - 1) * p.dilation_x;
  const int64_t columns = up(p.width, p.stride_x), rows = up(p.height, p.stride_y);
  p.x_pitch =
      in_lanes(std::max(in_lanes(p.out_width) + reach_x / p.stride_x, up(p.left, p.stride_x) + in_lanes(columns)));
  p.x_row = p.stride_x * p.x_pitch;
  p.x_rows = std::max(p.top + p.height, (p.out_height - 1) * p.stride_y + reach_y + 1);
  p.grad_above = up(reach_y - p.top, p.stride_y);
  p.grad_left = up(reach_x - p.left, p.stride_x);
  p.grad_rows = p.grad_above + std::max(p.out_height, rows + (p.stride_y - 1 + p.top) / p.stride_y);
  p.grad_pitch = in_lanes(p.grad_left +
                          std::max(in_lanes(p.out_width), in_lanes(columns) + (p.stride_x - 1 + p.left) / p.stride_x));
  p.half_rows = p.stride_x == 2 ? rows : 0;
  p.half_pitch = in_lanes(columns);
  p.z_pitch = in_lanes(p.out_width);
  p.keep = true;
  const int64_t values = p.x_values() + p.grad_values() + p.half_values() + p.z_values();
  p.images = std::clamp<int64_t>(kValuesAtOnce / values, 1, p.batch);
  p.keep = p.images == p.batch;
  p.taps = taps.data();
  p.grad_taps = grad_taps.data();

  PlanarTap* tap = taps.data();
  for (int64_t r = 0; r < p.filter_height; ++r)
    for (int64_t s = 0; s < p.filter_width; ++s) {
      const int64_t u = s * p.dilation_x;
      const int64_t offset = r * p.dilation_y * p.x_row + u % p.stride_x * p.x_pitch + u / p.stride_x;
      *tap++ = {offset, r * p.filter_width + s, s == 0 ? p.filter_width : 0, 0};
    }
  // A value of x in row first_row + i * stride_y is read through tap r by row i + (first_row + top - r * dilation_y) /
  // stride_y of z, where that has no remainder; likewise columns.
  tap = grad_taps.data();
  for (int64_t first_row = 0; first_row < p.stride_y; ++first_row)
    for (int64_t first_column = 0; first_column < p.stride_x; ++first_column)
      for (int64_t r = 0; r < p.filter_height; ++r) {
        PlanarTap* const start = tap;
        for (int64_t s = 0; s < p.filter_width; ++s) {
          const int64_t y = first_row + p.top - r * p.dilation_y, x = first_column + p.left - s * p.dilation_x;
          if (y % p.stride_y != 0 || x % p.stride_x != 0) continue;
          *tap++ = {y / p.stride_y * p.grad_pitch + x / p.stride_x, r * p.filter_width + s, 0,
                    first_row * p.stride_x + first_column};
        }
        if (tap != start) start->run = tap - start;
      }
  return p;
}

// ---- numbers and memory ---------------------------------------------------------------------------------------------

// Those of batch_norm_act, for its per-channel numbers.
BatchNormActProblem channels_of(const DepthwiseShape& shape) {
  BatchNormActProblem p{};
  static_cast<BatchNormActShape&>(p) = shape;
  p.planar = true;
  return p;
}

// [C, 1, R, S] as [C][R * S].
template <class S>
const S* pack(const DepthwisePlanes& p, const Tensor& filter, Scratch& scratch) {
  const std::span<S> packed = scratch.take<S>(p.channels * p.filter_size());
  const auto* from = static_cast<const S*>(filter.const_data_ptr());
  S* to = packed.data();
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t r = 0; r < p.filter_height; ++r)
      for (int64_t s = 0; s < p.filter_width; ++s)
        *to++ = from[c * filter.stride(0) + r * filter.stride(2) + s * filter.stride(3)];
  return packed.data();
}

const void* pack_any(const DepthwisePlanes& p, const Tensor& filter, Scratch& scratch) {
  return p.dtype == DataType::f64 ? static_cast<const void*>(pack<double>(p, filter, scratch))
                                  : pack<float>(p, filter, scratch);
}

template <class S>
void unpack(const DepthwisePlanes& p, const double* from, const Tensor& filter, S* to) {
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t r = 0; r < p.filter_height; ++r)
      for (int64_t s = 0; s < p.filter_width; ++s)
        to[c * filter.stride(0) + r * filter.stride(2) + s * filter.stride(3)] = static_cast<S>(*from++);
}

// Threads that take part, and what each of them has for itself.
class Workers {
 public:
  Workers(const DepthwisePlanes& p, bool backward, Scratch& scratch)
      : p_(p),
        count_(core::workers_for(p.count() * p.channels, core::kValuesPerThread, p.channels)),
        value_bytes_(p.dtype == DataType::f64 ? 8 : 4),
        sum_bytes_(backward ? p.filter_size() * kLanes * int64_t(sizeof(double)) : 0),
        x_bytes_(value_bytes_ * p.images * p.x_values()),
        grad_bytes_(backward ? value_bytes_ * p.images * p.grad_values() : 0),
        half_bytes_(backward ? value_bytes_ * p.images * p.half_values() : 0),
        z_bytes_(backward ? value_bytes_ * p.images * p.z_values() : 0),
        bytes_(sum_bytes_ + x_bytes_ + grad_bytes_ + half_bytes_ + z_bytes_),
        all_(scratch.take<std::byte>(count_ * bytes_)) {}
  // pass(memory, channel) for all channels.
  template <class Pass>
  void run(const Pass& pass) const {
    core::divide(count_, p_.channels, [&](int64_t worker, int64_t begin, int64_t end) {
      std::byte* const sums = all_.data() + worker * bytes_;
      std::byte *const x = sums + sum_bytes_, *const grad = x + x_bytes_, *const half = grad + grad_bytes_;
      std::fill_n(sums, bytes_, std::byte(0));
      for (int64_t c = begin; c < end; ++c)
        pass(PlanarMemory{x, grad, half, half + half_bytes_, reinterpret_cast<double*>(sums)}, c);
    });
  }

 private:
  const DepthwisePlanes& p_;
  const int64_t count_, value_bytes_, sum_bytes_, x_bytes_, grad_bytes_, half_bytes_, z_bytes_, bytes_;
  const std::span<std::byte> all_;
};

// Mean and biased variance of z.
void take_statistics(const DepthwisePlanes& p, const PlanarForward& args, const PlanarMemory& memory, int64_t channel,
                     bool exact, const Values& means, const Values& variances) {
  double sums[3];
  kernels().statistics(p, args, memory, channel, exact, sums);
  const double per_count = 1 / double(p.count()), offset = sums[1] * per_count, squares = sums[2] * per_count;
  // Infinite where squares do not fit, NaN where z is not finite.
  const bool finite = std::isfinite(squares);
  means[channel] = sums[0] + offset;
  variances[channel] = finite ? std::max(0.0, squares - offset * offset) : squares;
  if (!finite && !exact) take_statistics(p, args, memory, channel, true, means, variances);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> depthwise_train_planes(
    const DepthwiseShape& shape, const Tensor& x, const Tensor& conv_weight, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& running_mean, const OptionalTensor& running_var,
    const OptionalTensor& num_batches_tracked, std::optional<double> momentum, double eps) {
  check_train(shape, x, {}, weight, bias, running_mean, running_var, num_batches_tracked);
  StoredVectors statistics(shape, x);  // mean and invstd
  const double factor = count_batch(num_batches_tracked, momentum);
  const OutputLayout layout(shape);
  Tensor y = core::pooled_empty(layout.sizes, layout.strides, x);

  Scratch scratch;
  const int64_t taps = shape.filter_size();
  const DepthwisePlanes p = planes_of(shape, scratch.take<PlanarTap>(taps), scratch.take<PlanarTap>(taps));
  const BatchNormActProblem channels = channels_of(shape);
  const Values means = scratch.take<double>(p.channels), variances = scratch.take<double>(p.channels);
  RunningStatistics running(running_mean, running_var, p.channels, scratch);
  AffineNumbers affine(channels, weight, bias, scratch);
  PlanarForward args{};
  args.x = x.const_data_ptr();
  args.filter = pack_any(p, conv_weight, scratch);
  args.y = y.mutable_data_ptr();
  args.in_place = p.stride_y * p.stride_x > 1 || p.count() <= kInPlaceBelow;
  affine.give(args);
  const double unbiased = double(p.count()) / double(p.count() - 1);
  Workers(p, false, scratch).run([&](const PlanarMemory& memory, int64_t c) {
    take_statistics(p, args, memory, c, p.exact, means, variances);
    running.learn(means, variances, unbiased, factor, c, c + 1);
    to_invstd(variances, eps, c, c + 1);
    statistics.set(means, variances, c, c + 1);
    affine.set(means, variances, c, c + 1);
    kernels().forward(p, args, memory, c);
  });
  return {y, statistics.first, statistics.second};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> depthwise_backward_planes(const DepthwiseShape& shape, const Tensor& grad_y,
                                                                     const Tensor& x, const Tensor& conv_weight,
                                                                     const OptionalTensor& weight,
                                                                     const OptionalTensor& bias, const Tensor& mean,
                                                                     const Tensor& invstd, bool need_x,
                                                                     bool need_conv_weight, bool need_affine) {
  check_output(shape, grad_y, x);
  check_affine(shape, x, weight, bias, "depthwise_bn_act_backward");
  check_statistics(shape, x, mean, invstd, "depthwise_bn_act_backward");
  Tensor grad_x = core::pooled_empty_like_if(need_x, x);
  Tensor grad_conv_weight = core::empty_like_if(need_conv_weight, conv_weight);
  StoredVectors affine_grads(shape, x, need_affine);  // of weight and bias

  Scratch scratch;
  const int64_t taps = shape.filter_size();
  const DepthwisePlanes p = planes_of(shape, scratch.take<PlanarTap>(taps), scratch.take<PlanarTap>(taps));
  const BatchNormActProblem channels = channels_of(shape);
  const Values means = read(mean, p.channels, 0, scratch), invstds = read(invstd, p.channels, 1, scratch);
  AffineNumbers affine(channels, weight, bias, scratch);
  affine.set(means, invstds, 0, p.channels);
  PerChannel mean_grad(channels, scratch), slope_grad(channels, scratch);
  const Values sum_g = scratch.take<double>(p.channels), sum_gz = scratch.take<double>(p.channels);
  const Values per_value = scratch.take<double>(p.channels), slopes = scratch.take<double>(p.channels);
  const auto filter_sums = scratch.take<double>(need_conv_weight ? p.channels * taps : 0);
  PlanarBackward args{};
  args.grad_y = grad_y.const_data_ptr();
  args.x = x.const_data_ptr();
  args.filter = pack_any(p, conv_weight, scratch);
  affine.give(args);
  args.mean_grad = mean_grad.data();
  args.slope_grad = slope_grad.data();
  args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_filter = need_conv_weight ? filter_sums.data() : nullptr;
  const double per_count = 1 / double(p.count());
  Workers(p, true, scratch).run([&](const PlanarMemory& memory, int64_t c) {
    double sums[2];
    kernels().reduce(p, args, memory, c, sums);
    sum_g[c] = sums[0];
    sum_gz[c] = sums[1] * invstds[c];
    if (!need_x && !need_conv_weight) return;
    per_value[c] = sum_g[c] * per_count;
    slopes[c] = sums[1] * per_count * invstds[c] * invstds[c];
    mean_grad.set(per_value, c, c + 1);
    slope_grad.set(slopes, c, c + 1);
    kernels().gradients(p, args, memory, c);
  });
  if (need_conv_weight) {
    void* const to = grad_conv_weight.mutable_data_ptr();
    p.dtype == DataType::f64 ? unpack(p, filter_sums.data(), conv_weight, static_cast<double*>(to))
                             : unpack(p, filter_sums.data(), conv_weight, static_cast<float*>(to));
  }
  affine_grads.set(sum_gz, sum_g, 0, p.channels);
  return {grad_x, grad_conv_weight, affine_grads.first, affine_grads.second};
}

}  // namespace deepops
