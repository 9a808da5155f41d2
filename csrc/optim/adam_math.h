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

#include "optim/adam.h"
#include "optim/rule_math.h"

namespace deepops::DEEPOPS_ISA {

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
  constexpr int kCount = optim::Adam::Group::kPowers;
  const uint32_t bits = counter_bits(t);
  double v[kCount];
  for (int k = 0; k < kCount; ++k) v[k] = has_factor(bits, k) ? powers[k] : 1;
  for (int m = kCount / 2; m > 0; m /= 2) {
    for (int k = 0; k < m; ++k) v[k] = v[k] * v[k + m];
  }
  return v[0];
}

template <>
struct Math<optim::Adam> {
  using Scalars = optim::Adam::Scalars;

  template <class T>
  struct Factors {
    T grad_factor, param_decay, grad_decay, lerp_weight, beta2, one_minus_beta2;
    Divisor<T> bias2_sqrt;
    T eps, minus_step_size;
    bool decays_grad, lerp_from_grad;
  };

  template <class T>
  DEEPOPS_HD static Factors<T> rounded(const Scalars& s) {
    return {T(s.grad_factor),
            T(s.param_decay),
            T(s.grad_decay),
            T(s.lerp_weight),
            T(s.beta2),
            T(s.one_minus_beta2),
            Divisor<T>(T(s.bias2_sqrt)),
            T(s.eps),
            T(s.minus_step_size),
            s.grad_decay != 0,
            s.lerp_from_grad};
  }

  // V: T, or 16 of them (Lanes<T>). s: by Adam::State.
  template <int kStates, class V, class T>
  DEEPOPS_HD static void element(V& p, V g, V (&s)[3], const Factors<T>& f) {
    constexpr bool kAmsgrad = (kStates >> optim::Adam::kMaxExpAvgSq & 1) != 0;
    V &m = s[optim::Adam::kExpAvg], &v = s[optim::Adam::kExpAvgSq], &v_max = s[optim::Adam::kMaxExpAvgSq];
    p = p * f.param_decay;
    g = g * f.grad_factor;
    if (f.decays_grad) g = g + f.grad_decay * p;
    m = lerp(m, g, f.lerp_weight, f.lerp_from_grad);
    v = v * f.beta2 + f.one_minus_beta2 * g * g;
    // torch.maximum: a NaN in either, for which both comparisons are false, stays.
    if (kAmsgrad) v_max = select(v_max < v, v, select(v <= v_max, v_max, v + v_max));
    const V denominator = divide(square_root(kAmsgrad ? v_max : v), f.bias2_sqrt) + f.eps;
    p = p + f.minus_step_size * m / denominator;
  }

  // beta1_t, beta2_t: the betas to the power of the step that is being taken. factor: of the gradients.
  DEEPOPS_HD static Scalars scalars(const optim::Adam::Hyper& h, double beta1_t, double beta2_t, double factor) {
    Scalars s;
    s.grad_factor = h.maximize != 0 ? -factor : factor;
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

  DEEPOPS_HD static Scalars scalars(const optim::Adam::Group& group, float t, double factor) {
    return scalars(group.hyper, power(group.beta1_powers, t), power(group.beta2_powers, t), factor);
  }
};

}  // namespace deepops::DEEPOPS_ISA
