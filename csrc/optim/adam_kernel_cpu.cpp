// Adam on raw pointers, compiled once per instruction set (cmake/CpuIsa.cmake). Plain loops that the compiler
// vectorises, where it can.
#include "core/lanes.h"
#include "optim/adam.h"
#include "optim/adam_math.h"

namespace deepops::DEEPOPS_ISA {

inline Lanes<float> square_root(Lanes<float> x) {
  constexpr int kParts = Lanes<float>::kParts;
  DEEPOPS_FOR_PARTS(k) {
    for (int i = 0; i < Lanes<float>::kPerPart; ++i) x.part[k][i] = square_root(float(x.part[k][i]));
  }
  return x;
}

namespace {

using optim::AdamChunk;
using optim::AdamScalars;

template <bool kGradDecay, bool kAmsgrad, class T>
void update(T* p, const T* g, T* m, T* v, T* v_max, int64_t n, const AdamFactors<T>& factors) {
  const AdamFactors<T> f = factors;  // a copy no store below can alias, so it stays in registers
#pragma GCC ivdep                    // element i of one array meets only element i of the others
  for (int64_t i = 0; i < n; ++i) {
    T unused = 0;
    adam_element<kGradDecay, kAmsgrad>(p[i], g[i], m[i], v[i], kAmsgrad ? v_max[i] : unused, f);
  }
}

// fp16 and bf16, computed in fp32. GCC vectorises no loop with a conversion from fp16: 16 lanes at a time by hand.
template <bool kGradDecay, bool kAmsgrad, class T>
void update_16_bit(T* p, const T* g, T* m, T* v, T* v_max, int64_t n, const AdamFactors<float>& f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes<float> wide_p = load_lanes(p + i), wide_m = load_lanes(m + i), wide_v = load_lanes(v + i), wide_max;
    if (kAmsgrad) wide_max = load_lanes(v_max + i);
    adam_element<kGradDecay, kAmsgrad>(wide_p, load_lanes(g + i), wide_m, wide_v, wide_max, f);
    store_lanes(p + i, wide_p);
    store_lanes(m + i, wide_m);
    store_lanes(v + i, wide_v);
    if (kAmsgrad) store_lanes(v_max + i, wide_max);
  }
  for (; i < n; ++i) {
    float wide_p = load(p + i), wide_m = load(m + i), wide_v = load(v + i), wide_max = 0;
    if (kAmsgrad) wide_max = load(v_max + i);
    adam_element<kGradDecay, kAmsgrad>(wide_p, load(g + i), wide_m, wide_v, wide_max, f);
    store(p + i, wide_p);
    store(m + i, wide_m);
    store(v + i, wide_v);
    if (kAmsgrad) store(v_max + i, wide_max);
  }
}

template <class T>
AdamFactors<core::OpMath<T>> rounded(const AdamScalars& s) {
  using C = core::OpMath<T>;
  return {C(s.sign),       C(s.param_decay), C(s.grad_decay),      C(s.lerp_weight), C(s.beta2), C(s.one_minus_beta2),
          C(s.bias2_sqrt), C(s.eps),         C(s.minus_step_size), s.lerp_from_grad};
}

template <bool kGradDecay, bool kAmsgrad, class T>
void update(const AdamChunk& c, const AdamScalars& scalars) {
  auto *p = static_cast<T*>(c.p), *m = static_cast<T*>(c.m), *v = static_cast<T*>(c.v),
       *v_max = static_cast<T*>(c.v_max);
  const auto* g = static_cast<const T*>(c.g);
  if constexpr (sizeof(T) == 2) {
    update_16_bit<kGradDecay, kAmsgrad>(p, g, m, v, v_max, c.n, rounded<T>(scalars));
  } else {
    update<kGradDecay, kAmsgrad>(p, g, m, v, v_max, c.n, rounded<T>(scalars));
  }
}

template <class T>
void update(const AdamChunk& c, const AdamScalars& s) {
  if (s.grad_decay != 0) {
    c.v_max ? update<true, true, T>(c, s) : update<true, false, T>(c, s);
  } else {
    c.v_max ? update<false, true, T>(c, s) : update<false, false, T>(c, s);
  }
}

}  // namespace

void adam_chunk(const AdamChunk& chunk, const AdamScalars& scalars) {
  DEEPOPS_DISPATCH_DTYPE(chunk.dtype, [&]<class T>() { update<T>(chunk, scalars); })
}

}  // namespace deepops::DEEPOPS_ISA
