// Depthwise convolution along one row of outputs, 16 channels at a time, for the CPU kernels of depthwise_bn_act.
//
// Compiled once per instruction set; include it from kernel files only.
#pragma once
#include "core/parts.h"
#include "depthwise_bn_act/depthwise_bn_act.h"

namespace deepops::DEEPOPS_ISA {

using Tap = DepthwiseTap;

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
// a / b for b > 0, rounded up.
inline int64_t up(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// The taps of a row of outputs, in the order in which they are added up.
struct Taps {
  Tap* tap;
  int64_t count = 0;
  int64_t first = INT64_MIN, last = INT64_MAX;  // outputs that need every tap

  // In the order of ascending offsets within a run: neighbouring taps of which output j + 1 reads with one what output
  // j reads with the next.
  void add(const Tap& one, bool same_run) {
    tap[count] = one;
    tap[count].run = 1;
    if (same_run) {
      int64_t start = count - 1;
      while (tap[start].run == 0) --start;
      if (tap[start].run < kLongestRun) ++tap[start].run, tap[count].run = 0;
    }
    ++count;
    first = most(first, one.first);
    last = least(last, one.last);
  }
  static constexpr int64_t kLongestRun = 3;
};

inline constexpr int kSumsAtOnce = kVectorBytes == 64 ? 8 : 4;
alignas(64) inline constexpr double kZeros[kLanes] = {};

// What a tap reads for output j, which is 0 in the padding.
template <class D>
DEEPOPS_INLINE const D* value_or_padding(const D* at, int64_t j, const Tap& tap) {
  return uint64_t(j - tap.first) < uint64_t(tap.last - tap.first) ? at : reinterpret_cast<const D*>(kZeros);
}

// A run of taps for `outputs` neighbouring outputs, of which j is the first. What they share is loaded once. A run is
// added up on its own: sums of sums are more accurate than one long sum, and cost no more additions.
template <int run, bool padded, class D, class S, int outputs>
DEEPOPS_INLINE void convolve_run(const D* in, int64_t step, const S* filter, const Tap* tap, int64_t j,
                                 Lanes<S> (&sum)[outputs]) {
  const D* const at = in + tap->offset + j * step;
  Lanes<S> weight[run], part[outputs];
  for (int s = 0; s < run; ++s) weight[s] = load_lanes(filter + tap[s].weight);
  _Pragma("GCC unroll 16") for (int k = 0; k < outputs + run - 1; ++k) {
    const D* const from = padded ? value_or_padding(at + k * step, j + k, *tap) : at + k * step;
    const Lanes<S> value = load_lanes(from);
    _Pragma("GCC unroll 8") for (int s = 0; s < run; ++s) {
      const int output = k - s;
      if (output < 0 || output >= outputs) continue;
      part[output] = s == 0 ? value * weight[0] : part[output] + value * weight[s];
      if (s == run - 1) sum[output] += part[output];
    }
  }
}

// Outputs [j, j + count), count <= outputs. padded: some of them lie beside the padding, or they are not all wanted.
template <int outputs, bool padded, class D, class S, class Out>
DEEPOPS_INLINE void convolve_block(const D* in, int64_t step, const S* filter, const Taps& taps, int64_t j,
                                   int64_t count, Out* out, int64_t out_step) {
  Lanes<S> sum[outputs];
  for (int k = 0; k < outputs; ++k) sum[k] = S(0);
  for (int64_t t = 0; t < taps.count;) {
    const Tap* const tap = taps.tap + t;
    const int64_t run = tap->run;
    if (run == 3) {
      convolve_run<3, padded>(in, step, filter, tap, j, sum);
    } else if (run == 2) {
      convolve_run<2, padded>(in, step, filter, tap, j, sum);
    } else {
      convolve_run<1, padded>(in, step, filter, tap, j, sum);
    }
    t += run;
  }
  _Pragma("GCC unroll 8") for (int k = 0; k < outputs; ++k) if (!padded || k < count)
      store_lanes(out + k * out_step, sum[k]);
}

// out[(j - begin) * out_step] = sum over taps of filter[weight] * in[offset + j * step], for j in [begin, end).
// D: float, double or 16 bits; S: what is computed in; Out: one of both.
template <class D, class S, class Out>
void convolve(const D* in, int64_t step, const S* filter, const Taps& taps, int64_t begin, int64_t end, Out* out,
              int64_t out_step) {
  for (int64_t j = begin; j < end; j += kSumsAtOnce, out += kSumsAtOnce * out_step) {
    const int64_t left = end - j;
    if (left >= kSumsAtOnce && taps.first <= j && j + kSumsAtOnce <= taps.last) {
      convolve_block<kSumsAtOnce, false>(in, step, filter, taps, j, kSumsAtOnce, out, out_step);
    } else if (left > 4 || kSumsAtOnce == 4) {
      convolve_block<kSumsAtOnce, true>(in, step, filter, taps, j, left, out, out_step);
    } else {
      convolve_block<4, true>(in, step, filter, taps, j, left, out, out_step);
    }
  }
}

// ---- the gradient of the filter -------------------------------------------------------------------------------------

inline constexpr int kTapsAtOnce = kVectorBytes == 64 ? 9 : kVectorBytes == 32 ? 5 : 3;

template <class D, class S, int count>
void correlate_taps(const D* in, int64_t step, const Tap* taps, const S* grad, int64_t begin, int64_t end,
                    double* sums) {
  Lanes<S> sum[count];
  const D* at[count];
  int64_t first = begin, last = end;
  for (int t = 0; t < count; ++t) {
    sum[t] = S(0);
    at[t] = in + taps[t].offset;
    first = most(first, taps[t].first);
    last = least(last, taps[t].last);
  }
  first = least(first, end);
  last = most(first, last);
  const auto beside_padding = [&](int64_t j, int64_t stop) __attribute__((always_inline)) {
    for (; j < stop; ++j) {
      const Lanes<S> value = load_lanes(grad + (j - begin) * kLanes);
      _Pragma("GCC unroll 16") for (int t = 0; t < count; ++t) sum[t] +=
          load_lanes(value_or_padding(at[t] + j * step, j, taps[t])) * value;
    }
  };
  beside_padding(begin, first);
  for (int64_t j = first; j < last; ++j) {
    const Lanes<S> value = load_lanes(grad + (j - begin) * kLanes);
    _Pragma("GCC unroll 16") for (int t = 0; t < count; ++t) sum[t] += load_lanes(at[t] + j * step) * value;
  }
  beside_padding(last, end);
  for (int t = 0; t < count; ++t) {
    double* const to = sums + taps[t].weight;
    store_lanes(to, load_lanes(to) + widen(sum[t]));
  }
}

// sums[weight] += sum over j in [begin, end) of grad[(j - begin) * 16] * in[offset + j * step], for up to kTapsAtOnce
// taps.
template <class D, class S, int count = kTapsAtOnce>
void correlate(const D* in, int64_t step, const Tap* taps, int64_t size, const S* grad, int64_t begin, int64_t end,
               double* sums) {
  if constexpr (count > 1) {
    if (size < count) return correlate<D, S, count - 1>(in, step, taps, size, grad, begin, end, sums);
  }
  correlate_taps<D, S, count>(in, step, taps, grad, begin, end, sums);
}

}  // namespace deepops::DEEPOPS_ISA
