// The activations and their derivatives, once for every backend: V is float, double or Lanes of them.
//
//   forward(z)      act(z)
//   backward(g, z)  g * act'(z), with torch's conventions where act' jumps. For relu, relu6 and leaky_relu with a slope
//                   >= 0, z may be replaced by act(z). NaN passes through both, as in torch.
#pragma once
#include "batch_norm_act/batch_norm_act.h"
#include "core/math.h"

namespace deepops::DEEPOPS_ISA {

struct Identity {
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return z;
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V&) const {
    return g;
  }
};

struct Relu {
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return select(z < V(0.0f), V(0.0f), z);
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    return select(z <= V(0.0f), V(0.0f), g);
  }
};

struct LeakyRelu {
  double negative_slope;
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return select(z > V(0.0f), z, z * constant<V>(negative_slope));
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    return select(z > V(0.0f), g, g * constant<V>(negative_slope));
  }
};

struct Relu6 {
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return select(z < V(0.0f), V(0.0f), select(z > V(6.0f), V(6.0f), z));
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    return select(z <= V(0.0f), V(0.0f), select(z >= V(6.0f), V(0.0f), g));
  }
};

// s = sigmoid(x) and 1 - s, neither by cancellation nor by infinity times 0.
template <class V>
struct SigmoidAndRest {
  V s, rest;
  DEEPOPS_HD explicit SigmoidAndRest(const V& x) {
    const V e = exp(V(0.0f) - x);
    s = V(1.0f) / (V(1.0f) + e);
    rest = select(x < V(0.0f), V(1.0f) - s, e * s);
  }
};

struct Silu {  // z * sigmoid(z)
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return z / (V(1.0f) + exp(V(0.0f) - z));
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    const SigmoidAndRest<V> sigmoid(z);
    return g * (sigmoid.s * (V(1.0f) + z * sigmoid.rest));
  }
};

struct Gelu {  // z * Phi(z) (Hendrycks and Gimpel 2016)
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return z * normal_cdf(z);
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    const V density = constant<V>(0.39894228040143267794) * exp(constant<V>(-0.5) * z * z);
    return g * (normal_cdf(z) + z * density);
  }
};

struct GeluTanh {  // z (1 + tanh u) / 2 = z * sigmoid(2 u), u = sqrt(2 / pi) (z + 0.044715 z^3)
  template <class V>
  DEEPOPS_HD V twice_u(const V& z) const {
    return constant<V>(1.59576912160573071176) * (z + constant<V>(0.044715) * z * z * z);
  }
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    return z / (V(1.0f) + exp(V(0.0f) - twice_u(z)));
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    const SigmoidAndRest<V> sigmoid(twice_u(z));
    const V twice_du = constant<V>(1.59576912160573071176) * (V(1.0f) + constant<V>(3 * 0.044715) * z * z);
    return g * (sigmoid.s + z * (sigmoid.s * sigmoid.rest) * twice_du);
  }
};

struct Hardswish {  // z * relu6(z + 3) / 6
  template <class V>
  DEEPOPS_HD V forward(const V& z) const {
    const V gate = select(z < V(-3.0f), V(0.0f), select(z > V(3.0f), V(6.0f), z + V(3.0f)));
    return z * gate / V(6.0f);
  }
  template <class V>
  DEEPOPS_HD V backward(const V& g, const V& z) const {
    const V inside = g * (z / V(3.0f) + V(0.5f));
    return select(z <= V(-3.0f), V(0.0f), select(z >= V(3.0f), g, inside));
  }
};

// Calls call(activation) with the object of one of the types above.
template <class Call>
DEEPOPS_HD void with_activation(Activation activation, double negative_slope, const Call& call) {
  switch (activation) {
    case Activation::identity:
      return call(Identity{});
    case Activation::relu:
      return call(Relu{});
    case Activation::leaky_relu:
      return call(LeakyRelu{negative_slope});
    case Activation::relu6:
      return call(Relu6{});
    case Activation::silu:
      return call(Silu{});
    case Activation::gelu:
      return call(Gelu{});
    case Activation::gelu_tanh:
      return call(GeluTanh{});
    case Activation::hardswish:
      return call(Hardswish{});
  }
}

}  // namespace deepops::DEEPOPS_ISA
