// Elementary functions, written once: for one value (V = float or double; host and device) and, in CPU kernels, for
// Lanes (V = Lanes<S>, core/lanes.h, to be included first). They live in the namespace of what they are compiled for.
#pragma once
#include <cstdint>

#include "core/host_device.h"

namespace deepops::DEEPOPS_ISA {

DEEPOPS_HD float select(bool condition, float yes, float no) { return condition ? yes : no; }
DEEPOPS_HD double select(bool condition, double yes, double no) { return condition ? yes : no; }

// The scalar behind V, and a constant of V in full precision.
template <class V>
struct ScalarOf {
  using Type = V;
};
#ifndef DEEPOPS_GPU
template <class S>
struct ScalarOf<Lanes<S>> {
  using Type = S;
};
#endif
template <class V>
DEEPOPS_HD V constant(double value) {
  return V(static_cast<typename ScalarOf<V>::Type>(value));
}

DEEPOPS_HD float shift_left_into_exponent(float value) {
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, value) << 23);
}

// c[0] + c[1] x + ... + c[n-1] x^(n-1), by Horner's rule.
template <class V, int n>
DEEPOPS_HD V polynomial(const V& x, const float (&c)[n]) {
  V value(c[n - 1]);
  for (int i = n - 2; i >= 0; --i) value = value * x + V(c[i]);
  return value;
}

// exp(x) in single precision, within 2 ulp on [-87.3, 88.3]; 0 below -87.7, infinite above 88.4.
// x = k ln 2 + r with |r| <= ln 2 / 2 (ln 2 split in two so that k ln 2 is exact), exp(r) = 1 + r + r^2 P(r); the
// coefficients of P are a minimax fit (relative error 3e-9) made for this file.
template <class V>
DEEPOPS_HD V exp_single(V x) {
  x = select(x < V(-88.1f), V(-88.1f), x);       // k = -127: the exponent field 0, which is 0
  x = select(x > V(88.8f), V(88.8f), x);         // k = 128: the exponent field 255, which is infinity; NaN runs through
  const V magic(12582912.0f + 127.0f);           // 1.5 * 2^23 + bias: adding it rounds to an integer,
  const V shifted = x * V(1.44269504f) + magic;  // whose low bits are k + 127
  const V k = shifted - magic;
  const V r = (x - k * V(0.693359375f)) - k * V(-2.12194440e-4f);
  const float c[] = {0.50000001f, 0.16666519f, 0.04166621f, 0.00836888f, 0.00139505f};
  return (V(1.0f) + (r + r * r * polynomial(r, c))) * shift_left_into_exponent(shifted);
}

// Standard normal distribution function Phi(x) in single precision, absolute error below 1e-7:
// Phi(-t) = exp(-t Q(t)) / 2 for 0 <= t <= 13.3, with Q a minimax fit of -log(2 Phi(-t)) / t made for this file.
template <class V>
DEEPOPS_HD V normal_cdf_single(V x) {
  V t = select(x < V(0.0f), V(0.0f) - x, x);
  t = select(t > V(13.3f), V(13.3f), t);
  const float c[] = {0.797885319017916f,     0.3183002363346653f,    0.03637553818291408f,    -0.004857761855811901f,
                     3.6448006125415944e-5f, 1.7713147948254237e-4f, -4.933826216430863e-5f,  7.510002002943607e-6f,
                     -7.122104144463737e-7f, 4.167446164247756e-8f,  -1.3759284897228346e-9f, 1.9595936027791713e-11f};
  const V tail = V(0.5f) * exp_single(V(0.0f) - t * polynomial(t, c));
  return select(x < V(0.0f), tail, V(1.0f) - tail);
}

DEEPOPS_HD float exp(float x) { return exp_single(x); }
DEEPOPS_HD double exp(double x) { return DEEPOPS_LIBM(exp)(x); }
DEEPOPS_HD float normal_cdf(float x) { return normal_cdf_single(x); }
DEEPOPS_HD double normal_cdf(double x) { return 0.5 * DEEPOPS_LIBM(erfc)(x * -0.70710678118654752440); }

#ifndef DEEPOPS_GPU
inline Lanes<float> exp(const Lanes<float>& x) { return exp_single(x); }
inline Lanes<float> normal_cdf(const Lanes<float>& x) { return normal_cdf_single(x); }
// Double precision is for checks, not for speed: libm, lane by lane.
inline Lanes<double> exp(const Lanes<double>& x) {
  Lanes<double> out;
  for (int lane = 0; lane < kLanes; ++lane) out.set(lane, exp(x[lane]));
  return out;
}
inline Lanes<double> normal_cdf(const Lanes<double>& x) {
  Lanes<double> out;
  for (int lane = 0; lane < kLanes; ++lane) out.set(lane, normal_cdf(x[lane]));
  return out;
}
#endif

}  // namespace deepops::DEEPOPS_ISA
