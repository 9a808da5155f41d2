// One SGD update of one element: the formula that every backend compiles.
//
// The order of operations is that of torch.optim._single_tensor_sgd (torch/optim/sgd.py); momentum in the form of
// Sutskever et al., "On the importance of initialization and momentum in deep learning" (2013), as torch has it:
//   g <- +-g + decay * p
//   b <- g at the first step of a parameter, else momentum * b + (1 - dampening) * g
//   g <- g + momentum * b (Nesterov), else b
//   p <- p - lr * g
#pragma once

#include "optim/rule_math.h"
#include "optim/sgd.h"

namespace deepops::DEEPOPS_ISA {

template <>
struct Math<optim::Sgd> {
  using Scalars = optim::Sgd::Scalars;

  template <class T>
  struct Factors {
    T grad_factor, weight_decay, momentum, one_minus_dampening, minus_lr;
    bool decays, nesterov, first;
  };

  template <class T>
  DEEPOPS_HD static Factors<T> rounded(const Scalars& s) {
    return {T(s.grad_factor), T(s.weight_decay), T(s.momentum), T(s.one_minus_dampening),
            T(s.minus_lr),    s.decays,          s.nesterov,    s.first};
  }

  // V: T, or 16 of them (Lanes<T>). s: by Sgd::State.
  template <int kStates, class V, class T>
  DEEPOPS_HD static void element(V& p, V g, V (&s)[3], const Factors<T>& f) {
    g = g * f.grad_factor;
    if (f.decays) g = g + f.weight_decay * p;
    if (kStates != 0) {
      V& b = s[optim::Sgd::kMomentumBuffer];
      b = f.first ? g : f.momentum * b + f.one_minus_dampening * g;
      g = f.nesterov ? g + f.momentum * b : b;
    }
    p = p + f.minus_lr * g;
  }

  DEEPOPS_HD static Scalars scalars(const optim::Sgd::Group& group, float t, double factor) {
    const optim::Sgd::Hyper& h = group.hyper;
    Scalars s;
    s.grad_factor = h.maximize != 0 ? -factor : factor;
    s.weight_decay = h.weight_decay;
    s.momentum = h.momentum;
    s.one_minus_dampening = 1 - h.dampening;
    s.minus_lr = -h.lr;
    s.decays = h.weight_decay != 0;
    s.nesterov = h.nesterov != 0;
    s.first = t == 1;
    return s;
  }
};

}  // namespace deepops::DEEPOPS_ISA
