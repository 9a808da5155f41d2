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

// 1 where the random word of a column is below the threshold, else 0; 16 columns from `column` on, a multiple of 16.
template <class S>
Lanes<S> lstm_draws(uint64_t seed, LstmStream stream, int64_t step, int64_t row, int64_t column, double p) {
  const uint64_t threshold = lstm_threshold(p);
  S out[kLanes];
  for (int part = 0; part < kLanes / 4; ++part) {
    const LstmWords words = lstm_random_words(seed, uint32_t(column / 4 + part), uint32_t(row), uint32_t(step), stream);
    for (int i = 0; i < 4; ++i) out[4 * part + i] = lstm_happens(words.word[i], threshold) ? S(1) : S(0);
  }
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

// Mean and 1 / sqrt(variance + eps) of `count` values that each_part(part, use) hands to use(lanes, how many of them),
// for 16 at a time.
template <class S>
struct RowStatistics {
  S mean, invstd;
};
template <class S, class EachPart>
RowStatistics<S> statistics_of(int64_t count, double eps, const EachPart& each_part) {
  Lanes<double> sum(0.0), squares(0.0);
  each_part([&](const Lanes<S>& value, int64_t) { sum += widen(value); });
  const double mean = sum_of_lanes(sum) / double(count);
  each_part([&](const Lanes<S>& value, int64_t valid) {
    Lanes<double> rest = widen(value) - Lanes<double>(mean);
    for (int64_t lane = valid; lane < kLanes; ++lane) rest.set(int(lane), 0);
    squares += rest * rest;
  });
  return {S(mean), S(1 / __builtin_sqrt(sum_of_lanes(squares) / double(count) + eps))};
}

// One unit block's p_i, p_f, p_o.
template <class S>
LstmPeephole<Lanes<S>> peephole_at(const LstmShape& p, const void* weights, int64_t unit) {
  const S* const at = static_cast<const S*>(weights) + unit;
  return {load_lanes(at), load_lanes(at + p.hidden_stride()), load_lanes(at + 2 * p.hidden_stride())};
}

}  // namespace deepops::DEEPOPS_ISA
