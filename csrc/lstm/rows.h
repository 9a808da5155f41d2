// What the LSTM's CPU kernels share: rounding to the type of the data, random factors.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/parts.h"
#include "lstm/lstm.h"
// after lanes.h, whose types the formulas are instantiated with
#include "lstm/lstm_math.h"

namespace deepops::DEEPOPS_ISA {

// To the values that T has.
template <class T>
struct Rounded {
  LanesOf<T> operator()(const LanesOf<T>& value) const {
    if constexpr (sizeof(T) > 2) {
      return value;
    } else {
      T stored[kLanes];
      store_lanes(stored, value);
      return load_lanes(stored);
    }
  }
};

// The variants of a call. A kernel exists twice: where `plain` says that nothing is set, a constant says it too, and
// the compiler leaves out all of them.
struct LstmVariants : LstmFormula {
  bool projects, normalizes, masks_hidden, has_lengths, zones_h, zones_c;
};
template <bool plain>
struct HasVariants {
  const LstmVariants v;
  explicit HasVariants(const LstmShape& p)
      : v{p, p.projects, p.normalizes, p.masks_hidden, p.has_lengths, p.zoneout_h > 0, p.zoneout_c > 0} {}
};
template <>
struct HasVariants<true> {
  static constexpr LstmVariants v{};
  explicit HasVariants(const LstmShape&) {}
};
inline bool is_plain(const LstmShape& p) {
  return !(p.peephole || p.clips || p.drops || p.projects || p.normalizes || p.masks_hidden || p.has_lengths ||
           p.zoneout_h > 0 || p.zoneout_c > 0);
}

// Four counters of Philox at once, each in the low half of a lane; what stands in the high halves is of no account.
typedef uint64_t FourWords __attribute__((vector_size(32)));

// The products of the low halves.
inline FourWords multiply_words(FourWords a, FourWords b) {
#if defined(__AVX2__)
  return (FourWords)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#else
  const FourWords low = FourWords{} + 0xFFFFFFFFu;
  return (a & low) * (b & low);
#endif
}

// lstm_random_words() of the 16 columns from `column` on, a multiple of 16.
inline void lstm_random_row(uint64_t seed, int64_t column, int64_t row, int64_t step, LstmStream stream,
                            uint32_t (&words)[kLanes]) {
  const FourWords m0 = FourWords{} + 0xD2511F53u, m1 = FourWords{} + 0xCD9E8D57u, low = FourWords{} + 0xFFFFFFFFu;
  FourWords c0 = FourWords{0, 1, 2, 3} + uint64_t(column / 4), c1 = FourWords{} + uint32_t(row);
  FourWords c2 = FourWords{} + uint32_t(step), c3 = FourWords{} + uint32_t(stream);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const FourWords product0 = multiply_words(c0, m0), product1 = multiply_words(c2, m1);
    c0 = (product1 >> 32) ^ c1 ^ (FourWords{} + k0);
    c2 = (product0 >> 32) ^ c3 ^ (FourWords{} + k1);
    c1 = product1;
    c3 = product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const FourWords first = (c0 & low) | c1 << 32, second = (c2 & low) | c3 << 32;
  const FourWords ordered[] = {__builtin_shufflevector(first, second, 0, 4, 1, 5),
                               __builtin_shufflevector(first, second, 2, 6, 3, 7)};
  __builtin_memcpy(words, ordered, sizeof(words));
}

// 1 where the random word of a column is below the threshold, else 0; 16 columns from `column` on, a multiple of 16.
template <class S>
Lanes<S> lstm_draws(uint64_t seed, LstmStream stream, int64_t step, int64_t row, int64_t column, double p) {
  const uint64_t threshold = lstm_threshold(p);
  if (threshold == 0) return Lanes<S>(S(0));
  const uint32_t last = uint32_t(threshold - 1);
  uint32_t words[kLanes];
  lstm_random_row(seed, column, row, step, stream, words);
  S out[kLanes];
  for (int i = 0; i < kLanes; ++i) out[i] = words[i] <= last ? S(1) : S(0);
  return load_lanes(out);
}

// What recurrent dropout multiplies g with.
template <class S>
Lanes<S> lstm_kept(const LstmShape& p, uint64_t seed, int64_t t, int64_t row, int64_t unit) {
  const double rate = p.recurrent_dropout;
  const Lanes<S> dropped = lstm_draws<S>(seed, kStreamRecurrentDropout, p.first_step + t, row, unit, rate);
  return (Lanes<S>(S(1)) - dropped) * Lanes<S>(S(rate < 1 ? 1 / (1 - rate) : 0));
}

// Where zoneout keeps the old value, for lstm_zoneout(); nothing is drawn in evaluation.
template <class S>
Lanes<S> lstm_stays(const LstmShape& p, uint64_t seed, LstmStream stream, double rate, int64_t t, int64_t row,
                    int64_t unit) {
  if (!p.random) return Lanes<S>(S(0));
  return lstm_draws<S>(seed, stream, p.first_step + t, row, unit, rate);
}

// Mean and 1 / sqrt(variance + eps) of `count` values that each_part(use) hands to use(parts, valid) `n` times 16 at a
// time, of each 16 the first `valid`, the others 0. Few are added in the type of the data, which is quicker; the sums
// go on in double. The squares are of distances to the rounded mean, which is what the values are measured from as
// well.
template <class S>
struct RowStatistics {
  S mean, invstd;
};
template <class S, class EachPart>
RowStatistics<S> statistics_of(int64_t count, double eps, const EachPart& each_part) {
  Lanes<double> sum(0.0), squares(0.0);
  each_part([&]<int n>(const Lanes<S>(&parts)[n], int64_t) {
    Lanes<S> few = parts[0];
    for (int i = 1; i < n; ++i) few = few + parts[i];
    sum += widen(few);
  });
  const double mean = sum_of_lanes(sum) / double(count);
  each_part([&]<int n>(const Lanes<S>(&parts)[n], int64_t valid) {
    Lanes<S> few(S(0));
    for (int i = 0; i < n; ++i) {
      const Lanes<S> rest = parts[i] - Lanes<S>(S(mean));
      few = few + rest * rest;
    }
    squares += widen(valid < kLanes ? first_of(few, valid) : few);
  });
  const double off = mean - double(S(mean)), variance = sum_of_lanes(squares) / double(count) - off * off;
  return {S(mean), S(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps))};
}

// One unit block's p_i, p_f, p_o.
template <class S>
LstmPeephole<Lanes<S>> peephole_at(const LstmShape& p, const void* weights, int64_t unit) {
  const S* const at = static_cast<const S*>(weights) + unit;
  return {load_lanes(at), load_lanes(at + p.hidden_stride()), load_lanes(at + 2 * p.hidden_stride())};
}

}  // namespace deepops::DEEPOPS_ISA
