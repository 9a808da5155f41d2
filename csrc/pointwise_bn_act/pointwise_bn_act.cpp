// pointwise_bn_act on the CPU: checks, allocation, what is done with the weights, the order of the passes,
// registration.
//
// Each pass is one parallel region.
#include "pointwise_bn_act/pointwise_bn_act.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "batch_norm_act/host.h"
#include "batch_norm_act/per_channel.h"
#include "batch_norm_act/running.h"
#include "core/allocate.h"
#include "core/memory_pool.h"
#include "core/parallel.h"

namespace deepops {
namespace {

constexpr int64_t kLanes = PointwiseProblem::kLanes;
constexpr int64_t kMostItems = 32, kRowsOfItem = 10 * PointwiseProblem::kBlock, kBlocksOfItem = 8;
constexpr int64_t kStreamAbove = 16 << 20;  // bytes of y that do not stay in the cache anyway
constexpr int64_t kSamples = 8, kVectorBytes = 64;

const PointwiseKernels& kernels(const PointwiseProblem& p) {
  return p.planar() ? *DEEPOPS_CHOOSE_ISA(pointwise_planar_kernels) : *DEEPOPS_CHOOSE_ISA(pointwise_kernels);
}

PointwiseProblem problem_of(const Tensor& x, const Tensor& filter, const std::string& activation,
                            double negative_slope) {
  constexpr const char* kOp = "pointwise_bn_act";
  core::check_cpu(x, kOp, "x");
  PointwiseProblem p{};
  const bool rows = x.dim() == 4 && is_channels_last(x);
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && (rows || x.is_contiguous()), kOp,
                  ": x must be [N, C, H, W], not empty, channels_last or contiguous");
  p.dtype = core::data_type_of(x, kOp, "x");
  STD_TORCH_CHECK(p.dtype <= DataType::f64, kOp, ": x must be float32 or float64");
  core::check_same_device(filter, x, kOp, "conv_weight");
  STD_TORCH_CHECK(filter.dim() == 4 && filter.size(1) == x.size(1) && filter.size(2) == 1 && filter.size(3) == 1 &&
                      filter.size(0) > 0 && filter.scalar_type() == x.scalar_type() && filter.is_contiguous(),
                  kOp, ": conv_weight must be [K, C, 1, 1], contiguous, with the dtype of x");
  p.activation = activation_of(activation);
  p.negative_slope = negative_slope;
  p.batch = x.size(0);
  p.channels = filter.size(0);
  p.inputs = x.size(1);
  p.inner = x.size(2) * x.size(3);
  p.channels_adjacent = rows;
  p.items =
      std::clamp<int64_t>(rows ? p.rows() / kRowsOfItem : p.batch * p.blocks_of_image() / kBlocksOfItem, 1, kMostItems);
  return p;
}

// Whether a bit a value is all that the backward needs of z.
bool has_two_slopes(const PointwiseProblem& p) {
  return p.activation == Activation::relu || p.activation == Activation::relu6 ||
         p.activation == Activation::leaky_relu;
}

// [N, K, H, W], in the layout of x.
struct OutputLayout {
  int64_t sizes[4], strides[4];
  OutputLayout(const PointwiseProblem& p, const Tensor& x)
      : sizes{p.batch, p.channels, x.size(2), x.size(3)},
        strides{p.inner * p.channels, p.planar() ? p.inner : 1, x.size(3) * (p.planar() ? 1 : p.channels),
                p.planar() ? 1 : p.channels} {}
};

void check_kept(const PointwiseProblem& p, const Tensor& x, const Tensor& grad_y, const Tensor& moments,
                const Tensor& bits) {
  constexpr const char* kOp = "pointwise_bn_act_backward";
  core::check_cpu(grad_y, kOp, "grad_y");
  const OutputLayout layout(p, x);
  bool same = grad_y.dim() == 4 && grad_y.scalar_type() == x.scalar_type();
  for (int64_t d = 0; same && d < 4; ++d)
    same = grad_y.size(d) == layout.sizes[d] && (grad_y.size(d) == 1 || grad_y.stride(d) == layout.strides[d]);
  STD_TORCH_CHECK(same, kOp, ": grad_y must have the shape of the output, and the dtype and memory layout of x");
  core::check_vector(moments, (1 + p.inputs) * p.inputs, ScalarType::Double, x, kOp, "moments");
  core::check_vector(bits, has_two_slopes(p) ? p.words() : 0, ScalarType::Short, x, kOp, "bits");
}

// ---- numbers between tensors and kernels ----------------------------------------------------------------------------

// Numbers in the type that kernels compute in.
class Numbers {
 public:
  Numbers(const PointwiseProblem& p, int64_t count, Scratch& scratch) : is_double_(p.dtype == DataType::f64) {
    is_double_ ? void(doubles_ = scratch.take<double>(count)) : void(floats_ = scratch.take<float>(count));
  }
  Numbers(const PointwiseProblem& p, const Values& values, Scratch& scratch)
      : Numbers(p, int64_t(values.size()), scratch) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void set(size_t at, double value) {
    is_double_ ? void(doubles_[at] = value) : void(floats_[at] = static_cast<float>(value));
  }
  double operator[](size_t at) const { return is_double_ ? doubles_[at] : floats_[at]; }
  void* data() { return is_double_ ? static_cast<void*>(doubles_.data()) : floats_.data(); }

 private:
  const bool is_double_;
  std::span<float> floats_;
  std::span<double> doubles_;
};

double value_at(const PointwiseProblem& p, const void* data, int64_t at) {
  return p.dtype == DataType::f64 ? static_cast<const double*>(data)[at] : static_cast<const float*>(data)[at];
}

// Zeros.
Values zeros(int64_t count, Scratch& scratch) {
  const Values values = scratch.take<double>(count);
  std::fill(values.begin(), values.end(), 0);
  return values;
}

// W, [slots][input slots], padded with zeros.
Values read_filter(const PointwiseProblem& p, const Tensor& filter, Scratch& scratch) {
  const Values values = zeros(p.slots() * p.input_slots(), scratch);
  const void* const data = filter.const_data_ptr();
  for (int64_t k = 0; k < p.channels; ++k)
    for (int64_t c = 0; c < p.inputs; ++c) values[k * p.input_slots() + c] = value_at(p, data, k * p.inputs + c);
  return values;
}

// What both directions compute u = W' (x - center) + b' from: the same numbers from the same statistics.
struct Affine {
  Numbers center, forward_weight, backward_weight, bias;

  // scales, biases: [K]. means: of x.
  Affine(const PointwiseProblem& p, const Values& filter, const Values& means, const Values& scales,
         const Values& biases, Scratch& scratch)
      : center(p, p.input_slots(), scratch),
        forward_weight(p, p.slots() * p.inputs, scratch),
        backward_weight(p, p.slots() * p.input_slots(), scratch),
        bias(p, p.slots(), scratch) {
    const int64_t slots = p.input_slots();
    for (int64_t c = 0; c < slots; ++c) center.set(c, c < p.inputs ? means[c] : 0);
    for (int64_t k = 0; k < p.slots(); ++k) {
      double shift = 0;
      for (int64_t c = 0; c < p.inputs; ++c) shift += filter[k * slots + c] * (center[c] - means[c]);
      bias.set(k, k < p.channels ? biases[k] + scales[k] * shift : 0);
    }
    p.dtype == DataType::f64 ? scale<double>(p, filter, scales) : scale<float>(p, filter, scales);
  }
  void give(PointwiseArguments& args) {
    args.center = center.data();
    args.forward_weight = forward_weight.data();
    args.backward_weight = backward_weight.data();
    args.bias = bias.data();
  }

 private:
  template <class S>
  void scale(const PointwiseProblem& p, const Values& filter, const Values& scales) {
    S* const by_rows = static_cast<S*>(backward_weight.data());
    S* const by_lanes = static_cast<S*>(forward_weight.data());
    for (int64_t k = 0, slots = p.input_slots(); k < p.slots(); ++k) {
      const double factor = k < p.channels ? scales[k] : 0;
      S* const row = by_rows + k * slots;
      for (int64_t c = 0; c < slots; ++c) row[c] = static_cast<S>(factor * filter[k * slots + c]);
      S* const lane = by_lanes + k / kLanes * kLanes * p.inputs + k % kLanes;
      for (int64_t c = 0; c < p.inputs; ++c) lane[c * kLanes] = row[c];
    }
  }
};

// Threads that take part, and what each of them has for itself.
class Workers {
 public:
  Workers(const PointwiseProblem& p, Scratch& scratch) : p_(p) {
    count_ = core::workers_for(p.rows() * p.channels, core::kValuesPerThread, p.items);
    workspace_ = scratch.take<double>(count_ * workspace_values(p));
  }
  // pass(problem, args, workspace, begin, end) over all work items.
  template <class Pass>
  void run(const Pass& pass, const PointwiseArguments& args) const {
    core::divide(count_, p_.items, [&](int64_t worker, int64_t begin, int64_t end) {
      pass(p_, args, workspace_.data() + worker * workspace_values(p_), begin, end);
    });
  }

 private:
  const PointwiseProblem& p_;
  int64_t count_;
  std::span<double> workspace_;
};

// Means of x [C] and its covariances [C, C], into `moments` [1 + C, C].
void take_moments(const PointwiseProblem& p, PointwiseArguments args, const Workers& workers, double* moments,
                  Scratch& scratch) {
  const int64_t slots = p.input_slots(), rows = p.rows(), samples = std::min(rows, kSamples);
  const Values shift = zeros(slots, scratch);
  for (int64_t c = 0; c < p.inputs; ++c) {
    for (int64_t i = 0; i < samples; ++i) shift[c] += value_at(p, args.x, p.x_at(i * rows / samples, c));
    shift[c] /= double(samples);
    if (!std::isfinite(shift[c])) shift[c] = 0;  // any value does
  }
  const Values sums = scratch.take<double>(p.items * p.moments_of_item());
  args.shift = shift.data();
  args.moments = sums.data();
  workers.run(kernels(p).moments, args);
  add_items(sums, p.items);
  const double per_row = 1 / double(rows);
  for (int64_t c = 0; c < p.inputs; ++c) {
    moments[c] = shift[c] + sums[c] * per_row;
    for (int64_t d = 0; d <= c; ++d) {
      const double product = sums[(1 + d) * slots + c] * per_row;
      const double covariance = product - sums[c] * per_row * (sums[d] * per_row);
      moments[(1 + c) * p.inputs + d] = moments[(1 + d) * p.inputs + c] = covariance;
    }
  }
}

// W cov(x), [slots][input slots].
Values times_covariance(const PointwiseProblem& p, const Values& filter, const double* moments, Scratch& scratch) {
  const int64_t slots = p.input_slots();
  const Values covariance = zeros(slots * slots, scratch), result = scratch.take<double>(p.slots() * slots);
  for (int64_t c = 0; c < p.inputs; ++c)
    std::copy_n(moments + (1 + c) * p.inputs, p.inputs, covariance.begin() + c * slots);
  DEEPOPS_CHOOSE_ISA(pointwise_product)(filter.data(), false, covariance.data(), result.data(), p.slots(), slots,
                                        slots);
  return result;
}

// sum over c of a[k][c] * b[k][c]
double dot(const PointwiseProblem& p, const Values& a, const Values& b, int64_t k) {
  double sum = 0;
  for (int64_t i = k * p.input_slots(), end = i + p.inputs; i < end; ++i) sum += a[i] * b[i];
  return sum;
}

// Whether some z is so small a difference of large terms that (x - mean) M, their sum over all z, has to be taken in
// double. Its error in grad_x was 1.3 times stock's otherwise, at 1e4; it is a third with it.
bool cancels(const PointwiseProblem& p, const Values& filter, const double* moments, const Values& invstds,
             Scratch& scratch) {
  constexpr double kOrdinary = 1024;  // (sum |w| sigma)^2 / (var + eps); of independent inputs about their number
  const Values deviations = scratch.take<double>(p.inputs);
  for (int64_t c = 0; c < p.inputs; ++c) deviations[c] = std::sqrt(std::max(moments[(1 + c) * p.inputs + c], 0.0));
  for (int64_t k = 0; k < p.channels; ++k) {
    double sum = 0;
    for (int64_t c = 0; c < p.inputs; ++c) sum += std::abs(filter[k * p.input_slots() + c]) * deviations[c];
    if (sum * sum * invstds[k] * invstds[k] > kOrdinary) return true;
  }
  return false;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> train_cpu(Tensor x, Tensor conv_weight, OptionalTensor weight,
                                                             OptionalTensor bias, OptionalTensor running_mean,
                                                             OptionalTensor running_var,
                                                             OptionalTensor num_batches_tracked,
                                                             std::optional<double> momentum, double eps,
                                                             std::string activation, double negative_slope, bool save) {
  const PointwiseProblem p = problem_of(x, conv_weight, activation, negative_slope);
  check_train(p, x, {}, weight, bias, running_mean, running_var, num_batches_tracked);
  StoredVectors statistics(p, x);  // mean and invstd
  const double factor = count_batch(num_batches_tracked, momentum);
  Tensor moments = core::empty_vector((1 + p.inputs) * p.inputs, ScalarType::Double, x);
  Tensor bits = core::empty_vector(save && has_two_slopes(p) ? p.words() : 0, ScalarType::Short, x);
  const OutputLayout layout(p, x);
  Tensor y = core::pooled_empty(layout.sizes, layout.strides, x);

  Scratch scratch;
  const Workers workers(p, scratch);
  PointwiseArguments args{};
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.stream = y.numel() * y.element_size() >= kStreamAbove && (p.planar() ? p.inner : p.channels) % kLanes == 0 &&
                reinterpret_cast<uintptr_t>(args.y) % kVectorBytes == 0;
  args.bits = bits.numel() ? static_cast<uint16_t*>(bits.mutable_data_ptr()) : nullptr;
  auto* const moment_data = static_cast<double*>(moments.mutable_data_ptr());
  take_moments(p, args, workers, moment_data, scratch);

  const Values filter = read_filter(p, conv_weight, scratch);
  const Values products = times_covariance(p, filter, moment_data, scratch);
  const Values means = zeros(p.channels, scratch), variances = scratch.take<double>(p.channels);
  for (int64_t k = 0; k < p.channels; ++k) {
    for (int64_t c = 0; c < p.inputs; ++c) means[k] += filter[k * p.input_slots() + c] * moment_data[c];
    const double variance = dot(p, products, filter, k);
    variances[k] = variance < 0 ? 0 : variance;
  }
  RunningStatistics running(running_mean, running_var, p.channels, scratch);
  running.learn(means, variances, double(p.count()) / double(p.count() - 1), factor, 0, p.channels);
  to_invstd(variances, eps, 0, p.channels);
  statistics.set(means, variances, 0, p.channels);

  const Values scales = read(weight, p.channels, 1, scratch);
  for (int64_t k = 0; k < p.channels; ++k) scales[k] *= variances[k];
  Affine affine(p, filter, {moment_data, size_t(p.inputs)}, scales, read(bias, p.channels, 0, scratch), scratch);
  affine.give(args);
  workers.run(kernels(p).forward, args);
  return {y, statistics.first, statistics.second, moments, bits};
}

template <class S>
void write_grad_filter(const PointwiseProblem& p, const Values& products, const Values& slopes, const Values& spread,
                       const Values& scales, Tensor& grad) {
  S* const to = static_cast<S*>(grad.mutable_data_ptr());
  for (int64_t k = 0; k < p.channels; ++k)
    for (int64_t c = 0; c < p.inputs; ++c) {
      const int64_t at = k * p.input_slots() + c;
      to[k * p.inputs + c] = static_cast<S>(scales[k] * (products[at] - slopes[k] * spread[at]));
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward_cpu(Tensor grad_y, Tensor x, Tensor conv_weight,
                                                        OptionalTensor weight, OptionalTensor bias, Tensor mean,
                                                        Tensor invstd, Tensor moments, Tensor bits,
                                                        std::string activation, double negative_slope, bool need_x,
                                                        bool need_conv_weight, bool need_affine) {
  const PointwiseProblem p = problem_of(x, conv_weight, activation, negative_slope);
  check_affine(p, x, weight, bias, "pointwise_bn_act_backward");
  check_statistics(p, x, mean, invstd, "pointwise_bn_act_backward");
  check_kept(p, x, grad_y, moments, bits);
  Tensor grad_x = core::pooled_empty_like_if(need_x, x);
  Tensor grad_conv_weight = core::empty_like_if(need_conv_weight, conv_weight);
  StoredVectors affine_grads(p, x, need_affine);  // of weight and bias

  Scratch scratch;
  const Workers workers(p, scratch);
  const int64_t slots = p.slots(), input_slots = p.input_slots();
  const auto* const moment_data = static_cast<const double*>(moments.const_data_ptr());
  const Values x_means = scratch.take<double>(p.inputs);
  std::copy_n(moment_data, p.inputs, x_means.begin());
  const Values filter = read_filter(p, conv_weight, scratch);
  const Values invstds = read(invstd, p.channels, 1, scratch), scales = read(weight, p.channels, 1, scratch);
  for (int64_t k = 0; k < p.channels; ++k) scales[k] *= invstds[k];
  Affine affine(p, filter, x_means, scales, read(bias, p.channels, 0, scratch), scratch);
  const Values sums = scratch.take<double>(p.items * p.sums_of_item());
  PointwiseArguments args{};
  affine.give(args);
  args.x = x.const_data_ptr();
  args.grad_y = grad_y.const_data_ptr();
  args.bits = bits.numel() ? static_cast<uint16_t*>(const_cast<void*>(bits.const_data_ptr())) : nullptr;
  args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  args.sums = sums.data();
  workers.run(kernels(p).backward, args);
  add_items(sums, p.items);

  // P, from x centred on its true mean.
  const Values products = zeros(slots * input_slots, scratch);
  for (int64_t c = 0; c < p.inputs; ++c) {
    const double offset = x_means[c] - affine.center[c];
    for (int64_t k = 0; k < p.channels; ++k)
      products[k * input_slots + c] = sums[p.product_at(k, c)] - offset * sums[k];
  }
  const Values sum_g = scratch.take<double>(p.channels), sum_gz = scratch.take<double>(p.channels);
  const Values slopes = scratch.take<double>(p.channels);
  for (int64_t k = 0; k < p.channels; ++k) {
    sum_g[k] = sums[k];
    sum_gz[k] = dot(p, products, filter, k);
    slopes[k] = sum_gz[k] * invstds[k] * invstds[k];  // times rows
  }
  if (need_conv_weight) {
    const Values spread = times_covariance(p, filter, moment_data, scratch);
    p.dtype == DataType::f64 ? write_grad_filter<double>(p, products, slopes, spread, scales, grad_conv_weight)
                             : write_grad_filter<float>(p, products, slopes, spread, scales, grad_conv_weight);
  }
  if (need_x) {
    const double per_row = 1 / double(p.rows());
    const Values scaled = zeros(slots * input_slots, scratch), slope = scratch.take<double>(input_slots * input_slots);
    const Values constant = zeros(input_slots, scratch), center = scratch.take<double>(input_slots);
    for (int64_t k = 0; k < p.channels; ++k)
      for (int64_t c = 0; c < p.inputs; ++c) {
        const int64_t at = k * input_slots + c;
        scaled[at] = scales[k] * slopes[k] * per_row * filter[at];
        constant[c] += scales[k] * sum_g[k] * per_row * filter[at];
      }
    DEEPOPS_CHOOSE_ISA(pointwise_product)(filter.data(), true, scaled.data(), slope.data(), input_slots, input_slots,
                                          slots);
    for (int64_t c = 0; c < input_slots; ++c) center[c] = affine.center[c];
    for (int64_t c = 0; c < p.inputs; ++c)  // x is centred on the rounded mean
      for (int64_t d = 0; d < p.inputs; ++d) constant[d] -= (x_means[c] - center[c]) * slope[c * input_slots + d];
    args.exact = cancels(p, filter, moment_data, invstds, scratch);
    Numbers slope_numbers(p, slope, scratch), constant_numbers(p, constant, scratch);
    args.center = args.exact ? center.data() : args.center;
    args.slope = args.exact ? slope.data() : slope_numbers.data();
    args.constant = args.exact ? constant.data() : constant_numbers.data();
    workers.run(kernels(p).finish, args);
  }
  for (int64_t k = 0; k < p.channels; ++k) sum_gz[k] *= invstds[k];
  affine_grads.set(sum_gz, sum_g, 0, p.channels);
  return {grad_x, grad_conv_weight, affine_grads.first, affine_grads.second};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("pointwise_bn_act_train", TORCH_BOX(&deepops::train_cpu));
  m.impl("pointwise_bn_act_backward", TORCH_BOX(&deepops::backward_cpu));
}
