// CPU side of batch statistics: what they leave behind, as results and in the running statistics.
#pragma once
#include <cmath>

#include "batch_norm_act/host.h"
#include "batch_norm_act/per_channel.h"

namespace deepops {

// Results with a number per channel, which come some channels at a time.
class StoredVectors : public TwoVectors {
 public:
  StoredVectors(const BatchNormActShape& p, const Tensor& x, bool wanted = true)
      : TwoVectors(p, x, wanted),
        wanted_(wanted),
        first_data_(first.mutable_data_ptr()),
        second_data_(second.mutable_data_ptr()) {}
  // Stores channels [begin, end) and rounds the values to what was stored.
  void set(const Values& firsts, const Values& seconds, int64_t begin, int64_t end) {
    if (!wanted_) return;
    write(first, first_data_, firsts, begin, end);
    write(second, second_data_, seconds, begin, end);
  }

 private:
  bool wanted_;
  void *first_data_, *second_data_;
};

// Variances of channels [begin, end) become 1 / sqrt(variance + eps).
inline void to_invstd(const Values& variances, double eps, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) variances[c] = 1 / std::sqrt(variances[c] + eps);
}

// How much of the running statistics a batch replaces; counts the batch. As torch: nothing for momentum=None without a
// count.
inline double count_batch(const OptionalTensor& num_batches_tracked, std::optional<double> momentum) {
  if (!num_batches_tracked.has_value()) return momentum.value_or(0);
  int64_t& batches = *static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  ++batches;
  return momentum.has_value() ? *momentum : 1.0 / double(batches);
}

// The running statistics, either of which may be missing.
class RunningStatistics {
 public:
  RunningStatistics(const OptionalTensor& mean, const OptionalTensor& var, int64_t channels, Scratch& scratch)
      : mean_(mean),
        var_(var),
        mean_data_(mean.has_value() ? mean->mutable_data_ptr() : nullptr),
        var_data_(var.has_value() ? var->mutable_data_ptr() : nullptr),
        means_(read(mean, channels, 0, scratch)),
        vars_(read(var, channels, 0, scratch)) {}

  // Takes in channels [begin, end) of a batch. unbiased: n / (n - 1).
  void learn(const Values& means, const Values& variances, double unbiased, double factor, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      means_[c] = (1 - factor) * means_[c] + factor * means[c];
      vars_[c] = (1 - factor) * vars_[c] + factor * unbiased * variances[c];
    }
    if (mean_data_) write(*mean_, mean_data_, means_, begin, end);
    if (var_data_) write(*var_, var_data_, vars_, begin, end);
  }

 private:
  const OptionalTensor &mean_, &var_;
  void *mean_data_, *var_data_;
  const Values means_, vars_;
};

}  // namespace deepops
