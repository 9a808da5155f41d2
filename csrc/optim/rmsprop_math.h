// One RMSprop update of one element: the formula that every backend compiles.
//
// The order of operations is that of torch.optim._single_tensor_rmsprop (torch/optim/rmsprop.py); after Tieleman and
// Hinton, "Lecture 6.5 - RMSProp" (2012), centered after Graves, "Generating Sequences with Recurrent Neural Networks"
// (2013):
//   g <- +-g + decay * p
//   v <- alpha * v + (1 - alpha) * g * g
//   a <- lerp(a, g, 1 - alpha)             centered, where v - a * a takes the place of v below
//   b <- momentum * b + g / (sqrt(v) + eps)
//   p <- p - lr * b                        without momentum p - lr * g / (sqrt(v) + eps)
#pragma once

#include "optim/rmsprop.h"
#include "optim/rule_math.h"

namespace deepops::DEEPOPS_ISA {

template <>
struct Math<optim::RmsProp> {
  using Scalars = optim::RmsProp::Scalars;

  template <class T>
  struct Factors {
    T grad_factor, weight_decay, alpha, one_minus_alpha, lerp_weight, eps, momentum, minus_lr;
    bool decays, lerp_from_grad;
  };

  template <class T>
  DEEPOPS_HD static Factors<T> rounded(const Scalars& s) {
    return {T(s.grad_factor), T(s.weight_decay), T(s.alpha), T(s.one_minus_alpha), T(s.lerp_weight), T(s.eps),
            T(s.momentum),    T(s.minus_lr),     s.decays,   s.lerp_from_grad};
  }

  // V: T, or 16 of them (Lanes<T>). s: by RmsProp::State.
  template <int kStates, class V, class T>
  DEEPOPS_HD static void element(V& p, V g, V (&s)[3], const Factors<T>& f) {
    constexpr bool kCentered = (kStates >> optim::RmsProp::kGradAvg & 1) != 0;
    constexpr bool kMomentum = (kStates >> optim::RmsProp::kMomentumBuffer & 1) != 0;
    V &v = s[optim::RmsProp::kSquareAvg], &a = s[optim::RmsProp::kGradAvg], &b = s[optim::RmsProp::kMomentumBuffer];
    g = g * f.grad_factor;
    if (f.decays) g = g + f.weight_decay * p;
    v = v * f.alpha + f.one_minus_alpha * g * g;
    V spread = v;
    if (kCentered) {
      a = lerp(a, g, f.lerp_weight, f.lerp_from_grad);
      spread = v - a * a;
    }
    const V denominator = square_root(spread) + f.eps;
    if (kMomentum) {
      b = f.momentum * b + g / denominator;
      p = p + f.minus_lr * b;
    } else {
      p = p + f.minus_lr * g / denominator;
    }
  }

  DEEPOPS_HD static Scalars scalars(const optim::RmsProp::Group& group, float, double factor) {
    const optim::RmsProp::Hyper& h = group.hyper;
    Scalars s;
    s.grad_factor = h.maximize != 0 ? -factor : factor;
    s.weight_decay = h.weight_decay;
    s.alpha = h.alpha;
    s.one_minus_alpha = 1 - h.alpha;
    s.lerp_from_grad = 1 - h.alpha >= 0.5;
    s.lerp_weight = s.lerp_from_grad ? (1 - h.alpha) - 1 : 1 - h.alpha;
    s.eps = h.eps;
    s.momentum = h.momentum;
    s.minus_lr = -h.lr;
    s.decays = h.weight_decay != 0;
    return s;
  }
};

}  // namespace deepops::DEEPOPS_ISA
