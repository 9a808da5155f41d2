// One Adam update of one element: the formula that every backend compiles.
//
// The order of operations is that of torch.optim._single_tensor_adam and of ATen's fused CPU kernel
// (torch/optim/adam.py, aten/src/ATen/native/cpu/FusedAdamKernel.cpp), after Kingma and Ba, "Adam: A Method for
// Stochastic Optimization" (2015); AMSGrad after Reddi et al. (2018); decoupled decay after Loshchilov and Hutter
// (2019):
//   p <- p * (1 - lr * decay)             decoupled decay
//   g <- +-g + decay * p                  L2 decay
//   m <- lerp(m, g, 1 - beta1)
//   v <- beta2 * v + (1 - beta2) * g * g
//   p <- p - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// Only additions, multiplications, IEEE division and square root, never contracted: the same bits everywhere.
#pragma once

#include "core/math.h"
#include "optim/adam.h"

namespace deepops::DEEPOPS_ISA {

DEEPOPS_HD float square_root(float x) { return DEEPOPS_LIBM(sqrtf)(x); }
DEEPOPS_HD double square_root(double x) { return DEEPOPS_LIBM(sqrt)(x); }
DEEPOPS_HD float fused_multiply_add(float a, float b, float c) { return DEEPOPS_LIBM(fmaf)(a, b, c); }
DEEPOPS_HD double fused_multiply_add(double a, double b, double c) { return DEEPOPS_LIBM(fma)(a, b, c); }

// One divisor of many numbers.
template <class T>
struct Divisor {
  DEEPOPS_HD explicit Divisor(T d) : value(d), reciprocal(1 / d) {}
  T value, reciprocal;
};

// x / d, the same bits with and without a fused multiply-add: with one, the quotient by the rounded reciprocal is
// mended by its exact remainder, which rounds correctly for every x and d away from the ends of the range (Brisebarre,
// Muller and Raina, "Accelerating correctly rounded floating-point division when the divisor is known in advance",
// 2004), in a third of a division's time. The remainder is NaN where x is not finite.
template <class V, class T>
DEEPOPS_HD V divide(V x, const Divisor<T>& d) {
#if defined(__FMA__) && !defined(DEEPOPS_GPU)
  const V quotient = x * d.reciprocal;
  const V remainder = fused_multiply_add(T(-1) * quotient, V(d.value), x);
  const V mended = fused_multiply_add(remainder, V(d.reciprocal), quotient);
  return select((remainder < T(0)) | (remainder > T(0)), mended, quotient);
#else
  return x / d.value;
#endif
}

// AdamScalars in the type the arithmetic is done in.
template <class T>
struct AdamFactors {
  T sign, param_decay, grad_decay, lerp_weight, beta2, one_minus_beta2;
  Divisor<T> bias2_sqrt;
  T eps, minus_step_size;
  bool lerp_from_grad;
};

template <class T>
DEEPOPS_HD AdamFactors<T> rounded(const optim::AdamScalars& s) {
  return {T(s.sign),
          T(s.param_decay),
          T(s.grad_decay),
          T(s.lerp_weight),
          T(s.beta2),
          T(s.one_minus_beta2),
          Divisor<T>(T(s.bias2_sqrt)),
          T(s.eps),
          T(s.minus_step_size),
          s.lerp_from_grad};
}

// V: T, or 16 of them (Lanes<T>).
template <bool kGradDecay, bool kAmsgrad, class V, class T>
DEEPOPS_HD void adam_element(V& p, V g, V& m, V& v, V& v_max, const AdamFactors<T>& f) {
  p = p * f.param_decay;
  g = g * f.sign;
  if (kGradDecay) g = g + f.grad_decay * p;
  // lerp(m, g, w) as ATen has it: m + w (g - m) for w < 1/2, else g + (w - 1) (g - m), exact at both ends.
  m = (f.lerp_from_grad ? g : m) + f.lerp_weight * (g - m);
  v = v * f.beta2 + f.one_minus_beta2 * g * g;
  // torch.maximum: a NaN in either, for which both comparisons are false, stays.
  if (kAmsgrad) v_max = select(v_max < v, v, select(v <= v_max, v_max, v + v_max));
  const V denominator = divide(square_root(kAmsgrad ? v_max : v), f.bias2_sqrt) + f.eps;
  p = p + f.minus_step_size * m / denominator;
}

// beta^t is the product of factor(0) ... factor(31), always as this tree, of which a warp has one leaf per lane:
//   for m = 16, 8, 4, 2, 1: v[k] = v[k] * v[k ^ m]
// For t below 2^k the upper factors are 1, and a power of two is its table entry itself.

// The bits of a step counter. Counters are whole and not negative, and exact up to 2^24, where fp32 counters stop; a
// fraction is cut off, a negative counter or a NaN counts as 0, and more than 2^32 - 1 as that.
DEEPOPS_HD uint32_t counter_bits(float t) {
  return !(t > 0) ? 0u : t < 4294967296.0f ? static_cast<uint32_t>(t) : 0xffffffffu;
}

DEEPOPS_HD bool has_factor(uint32_t bits, int k) { return (bits >> k & 1u) != 0; }

// On one thread. powers: beta^(2^k).
DEEPOPS_HD double power(const double* powers, float t) {
  constexpr int kCount = optim::AdamGroup::kPowers;
  const uint32_t bits = counter_bits(t);
  double v[kCount];
  for (int k = 0; k < kCount; ++k) v[k] = has_factor(bits, k) ? powers[k] : 1;
  for (int m = kCount / 2; m > 0; m /= 2) {
    for (int k = 0; k < m; ++k) v[k] = v[k] * v[k + m];
  }
  return v[0];
}

// beta1_t, beta2_t: the betas to the power of the step that is being taken.
DEEPOPS_HD optim::AdamScalars scalars_of(const optim::AdamHyper& h, double beta1_t, double beta2_t) {
  optim::AdamScalars s;
  s.sign = h.maximize != 0 ? -1 : 1;
  s.param_decay = h.decoupled_weight_decay != 0 ? 1 - h.lr * h.weight_decay : 1;
  s.grad_decay = h.decoupled_weight_decay != 0 ? 0 : h.weight_decay;
  s.lerp_from_grad = 1 - h.beta1 >= 0.5;
  s.lerp_weight = s.lerp_from_grad ? (1 - h.beta1) - 1 : 1 - h.beta1;
  s.beta2 = h.beta2;
  s.one_minus_beta2 = 1 - h.beta2;
  s.bias2_sqrt = square_root(1 - beta2_t);
  s.eps = h.eps;
  s.minus_step_size = -(h.lr / (1 - beta1_t));
  return s;
}

}  // namespace deepops::DEEPOPS_ISA
