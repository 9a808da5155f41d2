// CPU side of batch_norm_act: the geometry of a problem, the walk over its work items, and what the ops share of the
// passes.
//
// Each pass is one parallel region. Large planar data takes a single one for both: statistics and elementwise work of a
// few channels follow each other while their planes are in the cache. Measured on 2 cores with 1 MB of level-2 cache:
// 1.2x at 50 MB forward and backward, but 0.75x at 6 MB, where streaming through memory in order is faster.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <string>
#include <tuple>

#include "batch_norm_act/host.h"
#include "batch_norm_act/per_channel.h"
#include "batch_norm_act/running.h"
#include "core/allocate.h"
#include "core/checks.h"
#include "core/memory_pool.h"
#include "core/parallel.h"

namespace deepops {

inline constexpr int64_t kLanes = 16;
// Planar values that the cache will not hold from one pass to the next.
inline constexpr int64_t kTogetherAbove = 1 << 21;
inline constexpr int64_t kStreamAbove = 16 << 20;  // bytes of an elementwise pass that do not stay in the cache anyway
inline constexpr int64_t kRowTurn = 256;           // columns above which large data is taken row by row
inline constexpr int64_t kValuesPerBlock = 65536;  // of channels that take both passes together: half a level-2 cache
// Additions in single precision before a sum goes to double. The terms of a gradient cancel: their errors show sooner.
inline constexpr int kStatisticsFlush = 32, kGradientFlush = 16;
inline constexpr int64_t kValuesPerPiece = 32768;  // one work item of a statistics pass

inline const BatchNormActKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(batch_norm_act_kernels); }

inline BatchNormActProblem problem_of(const Tensor& x, const std::string& activation, double negative_slope,
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
// On 37 to 98 MB, in memory that was used before (core/memory_pool.h): 1.0 to 1.4 times as fast, 1.15 in the middle.
inline bool streams(const BatchNormActProblem& p, const Tensor& x, int tensors,
                    std::initializer_list<const void*> results) {
  if (p.dtype > DataType::f64 || (p.planar && p.inner % kLanes != 0)) return false;
  for (const void* data : results)
    if (reinterpret_cast<uintptr_t>(data) % 64 != 0) return false;
  const int64_t bytes = x.numel() * (p.dtype == DataType::f64 ? 8 : 4);
  return tensors * bytes > kStreamAbove;
}

// ---- the walk over the work items -----------------------------------------------------------------------------------

inline int64_t grain(int64_t values_per_item) {
  return std::max<int64_t>(1, core::kValuesPerThread / std::max<int64_t>(1, values_per_item));
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

inline constexpr auto nothing = [](int64_t, int64_t) {};  // for run()

// ---- statistics -----------------------------------------------------------------------------------------------------

// Statistics of one channel in double, two passes, for values whose squares do not fit single precision.
inline std::pair<double, double> careful_statistics(const BatchNormActProblem& p, const void* x, int64_t channel) {
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

// Mean and biased variance of every channel of a batch.
class BatchMoments {
 public:
  BatchMoments(const BatchNormActProblem& p, const Tensor& x, Scratch& scratch)
      : means(scratch.take<double>(p.channels)),
        variances(scratch.take<double>(p.channels)),
        p_(p),
        x_(x.const_data_ptr()),
        sums_(p, scratch),
        shift_(p, p.exact || p.dtype == DataType::f64, scratch),
        shifts_(scratch.take<double>(p.channels)),
        sum_(scratch.take<double>(p.channels)),
        squares_(scratch.take<double>(p.channels)) {}

  void give(BatchNormActForward& args) {
    args.x = x_;
    args.sums = sums_.data();
    args.shift = shift_.data();
  }
  Sums& sums() { return sums_; }

  // Before the sums of channels [begin, end) are taken, and after.
  void prepare(int64_t begin, int64_t end) {
    kernels().sample(p_, x_, begin, end, shifts_.data() + begin);
    shift_.set(shifts_, begin, end);
  }
  void finish(int64_t begin, int64_t end) {
    const double per_count = 1 / double(p_.count());
    sums_.read(begin, end, sum_, squares_);
    bool finite = true;
    for (int64_t c = begin; c < end; ++c) {
      const double offset = sum_[c] * per_count;
      means[c] = shifts_[c] + offset;
      variances[c] = std::max(0.0, squares_[c] * per_count - offset * offset);
      finite &= squares_[c] - squares_[c] == 0;
    }
    for (int64_t c = begin; c < end && !finite; ++c)
      if (!std::isfinite(squares_[c]) && p_.dtype <= DataType::f64)
        std::tie(means[c], variances[c]) = careful_statistics(p_, x_, c);
  }

  const Values means, variances;

 private:
  const BatchNormActProblem& p_;
  const void* x_;
  Sums sums_;
  PerChannel shift_;
  const Values shifts_, sum_, squares_;
};

// ---- backward -------------------------------------------------------------------------------------------------------

// What the passes of a backward are given.
class GradientPass {
 public:
  GradientPass(const BatchNormActProblem& p, const Tensor& grad_y, const Tensor& x, const OptionalTensor& kept,
               const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& invstd,
               Scratch& scratch)
      : invstds_(read(invstd, p.channels, 1, scratch)),
        affine_(p, weight, bias, scratch),
        mean_grad_(p, scratch),
        slope_grad_(p, scratch),
        per_value_(scratch.take<double>(p.channels)) {
    affine_.set(read(mean, p.channels, 0, scratch), invstds_, 0, p.channels);
    affine_.give(args);
    args.grad_y = grad_y.const_data_ptr();
    args.x = x.const_data_ptr();
    args.kept = p.activation == Activation::identity ? nullptr : core::data_or_null(kept);
    args.kept_is_output = derivative_from_output(p.activation, p.negative_slope);
    args.mean_grad = mean_grad_.data();
    args.slope_grad = slope_grad_.data();
  }

  // Results of the elementwise pass; of those that are not wanted the data are empty.
  void set_results(const BatchNormActProblem& p, const Tensor& x, const Tensor& grad_x, const Tensor& grad_residual) {
    args.grad_x = grad_x.numel() ? grad_x.mutable_data_ptr() : nullptr;
    args.grad_residual = grad_residual.numel() ? grad_residual.mutable_data_ptr() : nullptr;
    const int tensors = 2 + (args.kept != nullptr) + (args.grad_x != nullptr) + (args.grad_residual != nullptr);
    args.stream = streams(p, x, tensors, {args.grad_x, args.grad_residual});
  }

  // What the statistics have to do with grad_x: the sums of g and of g * (x - mean) over all values of a channel.
  void set_sums(const Values& sum_g, const Values& sum_gx, double per_count, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) per_value_[c] = sum_g[c] * per_count;
    mean_grad_.set(per_value_, begin, end);
    for (int64_t c = begin; c < end; ++c) per_value_[c] = sum_gx[c] * per_count * invstds_[c] * invstds_[c];
    slope_grad_.set(per_value_, begin, end);
  }

  // Gradients of weight and bias from these sums, which are rounded to them.
  void set_affine(StoredVectors& gradients, const Values& sum_g, const Values& sum_gx, int64_t begin,
                  int64_t end) const {
    for (int64_t c = begin; c < end; ++c) sum_gx[c] *= invstds_[c];
    gradients.set(sum_gx, sum_g, begin, end);
  }

  BatchNormActBackward args{};

 private:
  const Values invstds_;
  AffineNumbers affine_;
  PerChannel mean_grad_, slope_grad_;
  const Values per_value_;
};

}  // namespace deepops
