// One step of an LSTM, for one unit of one sequence: the formulas that every backend compiles. V is float, double or,
// in CPU kernels, Lanes of them (core/lanes.h, to be included first). deepops/reference/lstm.py has them in Python,
// with their sources.
//
// What a step leaves behind is rounded to the type of the data before anything is computed from it (`round`): a step
// that reads its state from memory then has the bits of one that still has it in registers, and the backward computes
// with what the forward computed with.
#pragma once
#include <cstdint>

#include "core/math.h"
#include "lstm/lstm.h"

namespace deepops::DEEPOPS_ISA {

// ---- sigmoid and tanh -----------------------------------------------------------------------------------------------

// a * b + c; fused on GPUs, and in CPU kernels of instruction sets that have it: fewer roundings, fewer instructions.
#ifdef DEEPOPS_GPU
DEEPOPS_HD float lstm_multiply_add(float a, float b, float c) { return DEEPOPS_LIBM(fmaf)(a, b, c); }
DEEPOPS_HD double lstm_multiply_add(double a, double b, double c) { return DEEPOPS_LIBM(fma)(a, b, c); }
#else
DEEPOPS_HD float lstm_multiply_add(float a, float b, float c) { return a * b + c; }
DEEPOPS_HD double lstm_multiply_add(double a, double b, double c) { return a * b + c; }
template <class S>
Lanes<S> lstm_multiply_add(const Lanes<S>& a, const Lanes<S>& b, const Lanes<S>& c) {
  return fma(a, b, c);
}
#endif

// The integer that adding 1.5 * 2^(mantissa bits) + bias has left in the low bits, moved to the exponent: 2^k.
DEEPOPS_HD float lstm_power_of_two(float shifted) { return shift_left_into_exponent(shifted); }
DEEPOPS_HD double lstm_power_of_two(double shifted) {
  return __builtin_bit_cast(double, __builtin_bit_cast(int64_t, shifted) << 52);
}
#ifndef DEEPOPS_GPU
template <class S>
Lanes<S> lstm_power_of_two(const Lanes<S>& shifted) {
  using L = Lanes<S>;
  L out;
  for (int p = 0; p < L::kParts; ++p)
    out.part[p] = (typename L::Value)((typename L::Int)shifted.part[p] << (sizeof(S) == 4 ? 23 : 52));
  return out;
}
#endif

template <class S>
struct LstmExpConstants;
template <>
struct LstmExpConstants<float> {
  static constexpr float kLowest = -87.0f, kHighest = 88.0f;  // 2^k stays finite, and not 0
  static constexpr float kMagic = 12582912.0f + 127.0f, kPerLn2 = 1.44269504f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kTanhIsOne = 10.0f;
};
template <>
struct LstmExpConstants<double> {
  static constexpr double kLowest = -708.0, kHighest = 709.0;
  static constexpr double kMagic = 6755399441055744.0 + 1023.0, kPerLn2 = 1.4426950408889634;
  static constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
  static constexpr double kTanhIsOne = 20.0;
};

template <class V, class S, int n>
DEEPOPS_HD V lstm_polynomial(const V& x, const S (&c)[n]) {
  V value(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) value = lstm_multiply_add(value, x, V(c[i]));
  return value;
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2: fits made for this project, errors of exp(r) below 3e-9 and 2e-17.
template <class V>
DEEPOPS_HD V lstm_exp_rest(const V& r, float) {
  const float c[] = {0.50000001f, 0.16666519f, 0.04166621f, 0.00836888f, 0.00139505f};
  return lstm_polynomial(r, c);
}
template <class V>
DEEPOPS_HD V lstm_exp_rest(const V& r, double) {
  const double c[] = {0.5000000000000001,     0.16666666666666669,    0.04166666666662399,   0.008333333333330051,
                      0.0013888888917281794,  0.00019841269863105968, 2.480152119021773e-05, 2.7557268378684192e-06,
                      2.7620138719733994e-07, 2.5100424157005067e-08};
  return lstm_polynomial(r, c);
}

// exp(x) = scale * (1 + rest), for x in [kLowest, kHighest]: x = k ln 2 + r, scale = 2^k, rest = exp(r) - 1. NaN runs
// through.
template <class V>
struct LstmExp {
  V scale, rest;
  DEEPOPS_HD explicit LstmExp(const V& x) {
    using S = typename ScalarOf<V>::Type;
    using C = LstmExpConstants<S>;
    const V shifted = lstm_multiply_add(x, V(C::kPerLn2), V(C::kMagic));
    const V k = shifted - V(C::kMagic);
    const V r = lstm_multiply_add(k, V(-C::kLn2Low), lstm_multiply_add(k, V(-C::kLn2High), x));
    rest = lstm_multiply_add(r * r, lstm_exp_rest(r, S()), r);
    scale = lstm_power_of_two(shifted);
  }
};

template <class V, class S>
DEEPOPS_HD V lstm_between(const V& x, S low, S high) {
  const V above = select(x < V(low), V(low), x);
  return select(above > V(high), V(high), above);
}

// 1 / (1 + exp(-x)), within 2 ulp: 1 + 2^k is exact where it matters, which leaves one rounding before the division.
template <class V>
DEEPOPS_HD V lstm_sigmoid(const V& x) {
  using S = typename ScalarOf<V>::Type;
  using C = LstmExpConstants<S>;
  const V one = V(S(1)), minus = V(S(0)) - x;
  const LstmExp<V> e(lstm_between(minus, C::kLowest, C::kHighest));
  const V value = one / lstm_multiply_add(e.scale, e.rest, one + e.scale);
  return select(minus > V(C::kHighest), V(S(0)), value);
}

// Single precision, within 1e-7: 1 - 2 / (exp(2|x|) + 1), and near 0, where that would cancel, x + x^3 P(x^2), a fit
// made for this project (error 6e-9).
template <class V>
DEEPOPS_HD V lstm_tanh_as(const V& x, float) {
  using C = LstmExpConstants<float>;
  constexpr float kNear = 0.75f;
  const float c[] = {-0.33333331f, 0.13333179f, -0.05393585f, 0.02161532f, -0.00793381f, 0.00190950f};
  const V zero = V(0.0f), one = V(1.0f), squared = x * x;
  const V near = lstm_multiply_add(x * squared, lstm_polynomial(squared, c), x);
  const V size = select(x < zero, zero - x, x);
  const LstmExp<V> e(lstm_between(size + size, 0.0f, 2 * C::kTanhIsOne));
  const V far = one - V(2.0f) / lstm_multiply_add(e.scale, e.rest, one + e.scale);
  return select(size < V(kNear), near, select(x < zero, zero - far, far));
}

// Double precision, within 2 ulp: exp(2x) - 1 = (2^k - 1) + 2^k rest cancels nowhere; divided by exp(2x) + 1.
template <class V>
DEEPOPS_HD V lstm_tanh_as(const V& x, double) {
  using C = LstmExpConstants<double>;
  const LstmExp<V> e(lstm_between(x + x, -2 * C::kTanhIsOne, 2 * C::kTanhIsOne));
  const V less_one = lstm_multiply_add(e.scale, e.rest, e.scale - V(1.0));
  return less_one / (less_one + V(2.0));
}

template <class V>
DEEPOPS_HD V lstm_tanh(const V& x) {
  return lstm_tanh_as(x, typename ScalarOf<V>::Type());
}

// ---- random words ---------------------------------------------------------------------------------------------------

// What a random word is for: the last number of the counter. The masks of hidden states and inputs, one for a whole
// sequence, come as tensors.
enum LstmStream : uint32_t { kStreamZoneoutH = 0, kStreamZoneoutC = 1, kStreamRecurrentDropout = 2 };

struct LstmWords {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): the words of columns 4 * block to
// 4 * block + 3 of row `row`, the number of a sequence.
DEEPOPS_HD LstmWords lstm_random_words(uint64_t seed, uint32_t block, uint32_t row, uint32_t step, uint32_t stream) {
  uint32_t c0 = block, c1 = row, c2 = step, c3 = stream, k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// True with probability p; threshold: lstm_threshold(p).
DEEPOPS_HD bool lstm_happens(uint32_t word, uint64_t threshold) { return word < threshold; }
DEEPOPS_HD uint64_t lstm_threshold(double p) { return uint64_t(p * 4294967296.0); }

// ---- forward --------------------------------------------------------------------------------------------------------

// Of one unit: activated gates, or what their derivatives are multiplied with.
template <class V>
struct LstmGates {
  V i, f, g, o;
};

// p_i, p_f, p_o of one unit.
template <class V>
struct LstmPeephole {
  V i, f, o;
};

// i, f and g from the sums; o is left as it is.
template <class V, class Round>
DEEPOPS_HD LstmGates<V> lstm_gates(const LstmFormula& formula, LstmGates<V> sums, const LstmPeephole<V>& peephole,
                                   const V& c_before, const Round& round) {
  if (formula.peephole) {
    sums.i = sums.i + peephole.i * c_before;
    sums.f = sums.f + peephole.f * c_before;
  }
  return {round(lstm_sigmoid(sums.i)), round(lstm_sigmoid(sums.f)), round(lstm_tanh(sums.g)), sums.o};
}

// g after recurrent dropout. kept: 0 or 1 / (1 - p), see lstm_kept(); infinities are dropped too.
template <class V>
DEEPOPS_HD V lstm_dropped(const LstmFormula& formula, const V& g, const V& kept) {
  using S = typename ScalarOf<V>::Type;
  return formula.drops ? select(kept > V(S(0)), g * kept, V(S(0))) : g;
}

// f * c + i * g before clipping; g after dropout.
template <class V>
DEEPOPS_HD V lstm_unclipped(const LstmGates<V>& gates, const V& g, const V& c_before) {
  return gates.f * c_before + gates.i * g;
}

// The new cell; the gate o from its sum; what tanh sees is layer norm's business.
template <class V, class Round>
DEEPOPS_HD V lstm_new_cell(const LstmFormula& formula, const V& unclipped, const Round& round) {
  if (!formula.clips) return round(unclipped);
  using S = typename ScalarOf<V>::Type;
  return round(lstm_between(unclipped, S(-formula.cell_clip), S(formula.cell_clip)));
}

template <class V, class Round>
DEEPOPS_HD V lstm_output_gate(const LstmFormula& formula, const V& sum, const LstmPeephole<V>& peephole, const V& cell,
                              const Round& round) {
  return round(lstm_sigmoid(formula.peephole ? sum + peephole.o * cell : sum));
}

// `old` where `stays` (1 or 0), which happens with probability p; in evaluation the expectation of that.
template <class V>
DEEPOPS_HD V lstm_zoneout(const LstmFormula& formula, double p, const V& stays, const V& old, const V& now) {
  using S = typename ScalarOf<V>::Type;
  if (formula.random) return select(stays > V(S(0)), old, now);
  return constant<V>(p) * old + constant<V>(1 - p) * now;
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gradient of lstm_zoneout for `now`; what is left of it belongs to `old`.
template <class V>
DEEPOPS_HD V lstm_zoneout_now(const LstmFormula& formula, double p, const V& stays, const V& grad) {
  using S = typename ScalarOf<V>::Type;
  return formula.random ? select(stays > V(S(0)), V(S(0)), grad) : constant<V>(1 - p) * grad;
}
template <class V>
DEEPOPS_HD V lstm_zoneout_old(const LstmFormula& formula, double p, const V& stays, const V& grad) {
  using S = typename ScalarOf<V>::Type;
  return formula.random ? select(stays > V(S(0)), grad, V(S(0))) : constant<V>(p) * grad;
}

// Of out = o * tanh(shown), given grad_out: the gradients of o's sum and of shown. shown_tanh: tanh(shown).
template <class V>
struct LstmOutputGradients {
  V o, shown;
};
template <class V>
DEEPOPS_HD LstmOutputGradients<V> lstm_output_gradients(const V& grad_out, const V& o, const V& shown_tanh) {
  using S = typename ScalarOf<V>::Type;
  const V one = V(S(1));
  return {grad_out * shown_tanh * (o * (one - o)), grad_out * o * (one - shown_tanh * shown_tanh)};
}

// grad_cell: of the new cell, complete. The gradients of the sums i, f and g, and of the cell before; o: as it comes.
template <class V>
struct LstmStepGradients {
  LstmGates<V> sums;
  V c_before;
};
template <class V>
DEEPOPS_HD LstmStepGradients<V> lstm_step_gradients(const LstmFormula& formula, V grad_cell, const V& grad_o,
                                                    const LstmGates<V>& gates, const V& kept,
                                                    const LstmPeephole<V>& peephole, const V& c_before) {
  using S = typename ScalarOf<V>::Type;
  const V zero = V(S(0)), one = V(S(1));
  const V g = lstm_dropped(formula, gates.g, kept);
  if (formula.clips) {  // as torch.clamp: none beyond the limits, all of it on them
    const V cell = lstm_unclipped(gates, g, c_before), clip = V(S(formula.cell_clip));
    grad_cell = select(cell <= clip, select(cell >= zero - clip, grad_cell, zero), zero);
  }
  LstmStepGradients<V> out;
  out.sums.i = grad_cell * g * (gates.i * (one - gates.i));
  out.sums.f = grad_cell * c_before * (gates.f * (one - gates.f));
  out.sums.g = lstm_dropped(formula, grad_cell * gates.i, kept) * (one - gates.g * gates.g);
  out.sums.o = grad_o;
  out.c_before = grad_cell * gates.f;
  if (formula.peephole) out.c_before = out.c_before + out.sums.i * peephole.i + out.sums.f * peephole.f;
  return out;
}

}  // namespace deepops::DEEPOPS_ISA
