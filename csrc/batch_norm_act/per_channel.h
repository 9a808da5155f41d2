// Host side of batch_norm_act: per-channel numbers between tensors and kernels, and the sums that kernels bring back.
#pragma once
#include <algorithm>
#include <span>

#include "batch_norm_act/host.h"
#include "core/scratch.h"

namespace deepops {

using core::Scratch;

inline int64_t row_items(const BatchNormActProblem& p) { return p.pieces + (p.tail > 0); }

// ---- per-channel numbers, in the order the kernels want -------------------------------------------------------------

using Values = std::span<double>;  // one per channel

// A vector [C] in double; an absent one is full of `missing`.
inline Values read(const OptionalTensor& tensor, int64_t channels, double missing, Scratch& scratch) {
  const Values values = scratch.take<double>(channels);
  if (!tensor.has_value()) {
    std::fill(values.begin(), values.end(), missing);
  } else if (tensor->scalar_type() == ScalarType::Double) {
    std::copy_n(static_cast<const double*>(tensor->const_data_ptr()), channels, values.begin());
  } else {
    std::copy_n(static_cast<const float*>(tensor->const_data_ptr()), channels, values.begin());
  }
  return values;
}

// Adds up what several work items have left, in their order, into the numbers of the first.
inline void add_items(const Values& sums, int64_t items) {
  const size_t each = sums.size() / size_t(items);
  for (size_t from = each; from < sums.size(); from += each)
    for (size_t i = 0; i < each; ++i) sums[i] += sums[from + i];
}

// Stores channels [begin, end) and rounds `values` to what was stored: later arithmetic starts from there.
inline void write(const Tensor& tensor, void* data, const Values& values, int64_t begin, int64_t end) {
  if (tensor.scalar_type() == ScalarType::Double) {
    std::copy(values.begin() + begin, values.begin() + end, static_cast<double*>(data) + begin);
    return;
  }
  auto* floats = static_cast<float*>(data);
  for (int64_t c = begin; c < end; ++c) values[c] = floats[c] = static_cast<float>(values[c]);
}

// Per-channel numbers in opmath as the kernels read them: one for every channel, or for every column of the rows view.
class PerChannel {
 public:
  PerChannel(const BatchNormActProblem& p, Scratch& scratch) : PerChannel(p, p.dtype == DataType::f64, scratch) {}
  PerChannel(const BatchNormActProblem& p, bool is_double, Scratch& scratch) : p_(p), is_double_(is_double) {
    const int64_t count = p.planar ? p.channels : p.columns;
    is_double_ ? void(doubles_ = scratch.take<double>(count)) : void(floats_ = scratch.take<float>(count));
  }
  void set(const Values& values, int64_t begin, int64_t end) {
    is_double_ ? set_in(doubles_, values, begin, end) : set_in(floats_, values, begin, end);
  }
  const void* data() const { return is_double_ ? static_cast<const void*>(doubles_.data()) : floats_.data(); }

 private:
  template <class S>
  void set_in(const std::span<S>& numbers, const Values& values, int64_t begin, int64_t end) {
    if (p_.planar || p_.columns == p_.channels) {
      for (int64_t c = begin; c < end; ++c) numbers[c] = static_cast<S>(values[c]);
      return;
    }
    for (int64_t c = begin; c < end; ++c)
      for (int64_t base = c * p_.group; base < p_.columns; base += p_.period)
        std::fill_n(numbers.begin() + base, p_.group, static_cast<S>(values[c]));
  }
  const BatchNormActProblem& p_;
  const bool is_double_;
  std::span<float> floats_;
  std::span<double> doubles_;
};

// z = (x - mean) * scale + bias. Forward and backward both come here, from the same stored mean and invstd.
class AffineNumbers {
 public:
  AffineNumbers(const BatchNormActProblem& p, const OptionalTensor& weight, const OptionalTensor& bias,
                Scratch& scratch)
      : weight_(read(weight, p.channels, 1, scratch)),
        bias_values_(read(bias, p.channels, 0, scratch)),
        mean_(p, scratch),
        scale_(p, scratch),
        bias_(p, scratch) {}
  void set(const Values& mean, const Values& invstd, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) weight_[c] *= invstd[c];
    mean_.set(mean, begin, end);
    scale_.set(weight_, begin, end);
    bias_.set(bias_values_, begin, end);
  }
  template <class Args>
  void give(Args& args) const {
    args.mean = mean_.data();
    args.scale = scale_.data();
    args.bias = bias_.data();
  }

 private:
  Values weight_, bias_values_;
  PerChannel mean_, scale_, bias_;
};

// ---- sums -------------------------------------------------------------------------

// The pair of sums of every work item, and of every channel.
class Sums {
 public:
  Sums(const BatchNormActProblem& p, Scratch& scratch)
      : p_(p),
        data_(scratch.take<double>(p.planar ? 2 * p.channels * p.pieces : 2 * row_items(p) * p.columns).data()) {}
  double* data() const { return data_; }

  // Adds the pieces of all channels into the first one, in their order. Rows only; planar channels add up on their own.
  void add_pieces() {
    if (p_.planar) return;
    const int64_t width = 2 * p_.columns;
    for (int64_t item = 1; item < row_items(p_); ++item)
      for (int64_t j = 0; j < width; ++j) data_[j] += data_[item * width + j];
  }

  // Both sums of channels [begin, end).
  void read(int64_t begin, int64_t end, const Values& a, const Values& b) const {
    if (!p_.planar && p_.columns == p_.channels) {
      std::copy(&data_[begin], &data_[end], &a[begin]);
      std::copy(&data_[begin + p_.columns], &data_[end + p_.columns], &b[begin]);
      return;
    }
    for (int64_t c = begin; c < end; ++c) {
      a[c] = b[c] = 0;
      if (p_.planar) {
        for (int64_t item = c * p_.pieces; item < (c + 1) * p_.pieces; ++item) {
          a[c] += data_[2 * item];
          b[c] += data_[2 * item + 1];
        }
        continue;
      }
      for (int64_t base = c * p_.group; base < p_.columns; base += p_.period)
        for (int64_t j = base; j < base + p_.group; ++j) {
          a[c] += data_[j];
          b[c] += data_[j + p_.columns];
        }
    }
  }

 private:
  const BatchNormActProblem& p_;
  double* data_;
};

}  // namespace deepops
