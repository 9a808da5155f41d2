// CPU kernels of batch_norm_act; compiled once per instruction set, raw pointers only.
//
//   statistics   sums of x - shift and of its square            (Chan et al. 1983: a shift near the mean avoids
//                                                                cancellation); in single-precision lanes, each flushed
//                                                                to double after p.flush additions, or all in double
//   forward      y = act(z + residual), z = (x - mean) * scale + bias
//   reduce       sums of g and of g * (x - mean), g = grad_y * act'(z + residual)
//   backward     grad_x = scale * (g - mean_grad - (x - mean) * slope_grad), grad_residual = g
//
// z is computed by the same three operations in forward and backward, so the recomputed derivative can not disagree
// with the output. Geometry and work items: batch_norm_act.h; the walks through a tensor: views.h.
#include "batch_norm_act/batch_norm_act.h"

#include "batch_norm_act/views.h"

namespace deepops::DEEPOPS_ISA {
namespace {

enum class Kept { nothing, residual, output };

// ---- the passes -----------------------------------------------------------------------------------------------------

template <class T>
struct StatisticsTerms {
  const T* x;
  void fetch(int64_t i) const { __builtin_prefetch(x + i); }
  template <class V>
  void operator()(const Shift<V>& shift, int64_t i, V& a, V& b) const {
    const V d = Access<V>::load(x + i) - shift.near;
    a += d;
    b += d * d;
  }
};

template <class T>
void statistics(const Problem& p, const Forward& args, int64_t begin, int64_t end) {
  const StatisticsTerms<T> terms{static_cast<const T*>(args.x)};
  p.exact ? sum<double, 2, Shift>(p, args, begin, end, terms)
          : sum<core::OpMath<T>, 4, Shift>(p, args, begin, end, terms);
}

template <class T, bool has_residual, class Act>
void forward(const Problem& p, const Forward& args, int64_t begin, int64_t end, const Act& act) {
  const T *x = static_cast<const T*>(args.x), *residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  const bool stream = args.stream;
  for_all<core::OpMath<T>, Affine>(p, args, begin, end, [=]<class V>(const Affine<V>& affine, int64_t i) {
    V z = affine(Access<V>::load(x + i));
    if constexpr (has_residual) z = z + Access<V>::load(residual + i);
    put(y + i, act.forward(z), stream);
  });
  if (stream) finish_streaming();
}

// g = grad_y * act'(z + residual)
template <class T, Kept kept, class V, class Act>
V gate(const Backward& args, const Act& act, int64_t i, const V& x, const Affine<V>& affine) {
  const V grad_y = Access<V>::load(static_cast<const T*>(args.grad_y) + i);
  if constexpr (kept == Kept::output) {
    return act.backward(grad_y, Access<V>::load(static_cast<const T*>(args.kept) + i));
  } else {
    V z = affine(x);
    if constexpr (kept == Kept::residual) z = z + Access<V>::load(static_cast<const T*>(args.kept) + i);
    return act.backward(grad_y, z);
  }
}

template <class T, Kept kept, class Act>
struct GradientTerms {
  const Backward args;
  const Act act;
  void fetch(int64_t i) const {
    __builtin_prefetch(static_cast<const T*>(args.x) + i);
    __builtin_prefetch(static_cast<const T*>(args.grad_y) + i);
    if constexpr (kept != Kept::nothing) __builtin_prefetch(static_cast<const T*>(args.kept) + i);
  }
  template <class V>
  void operator()(const Affine<V>& affine, int64_t i, V& a, V& b) const {
    const V x = Access<V>::load(static_cast<const T*>(args.x) + i);
    const V g = gate<T, kept>(args, act, i, x, affine);
    a += g;
    b += g * affine.centered(x);
  }
};

template <class T, Kept kept, class Act>
void reduce(const Problem& p, const Backward& args, int64_t begin, int64_t end, const Act& act) {
  sum<core::OpMath<T>, kReductionTiles, Affine>(p, args, begin, end, GradientTerms<T, kept, Act>{args, act});
}

template <class T, Kept kept, class Act>
void backward(const Problem& p, const Backward& args, int64_t begin, int64_t end, const Act& act) {
  const T* x = static_cast<const T*>(args.x);
  T *grad_x = static_cast<T*>(args.grad_x), *grad_residual = static_cast<T*>(args.grad_residual);
  const bool stream = args.stream;
  for_all<core::OpMath<T>, InputGrad>(p, args, begin, end, [=]<class V>(const InputGrad<V>& numbers, int64_t i) {
    const V value = Access<V>::load(x + i);
    V g = gate<T, kept>(args, act, i, value, numbers.affine);
    if (grad_residual) put(grad_residual + i, g, stream);
    if (!grad_x) return;
    if (args.training) g = g - numbers.mean_grad - numbers.affine.centered(value) * numbers.slope_grad;
    put(grad_x + i, numbers.affine.scale * g, stream);
  });
  if (stream) finish_streaming();
}

// ---- run-time choices to template arguments -------------------------------------------------------------------------

void sample_any(const Problem& p, const void* x, int64_t begin, int64_t end, double* shift) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { sample(p, static_cast<const T*>(x), begin, end, shift); });
}

void statistics_any(const Problem& p, const Forward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { statistics<T>(p, args, begin, end); });
}

void forward_any(const Problem& p, const Forward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    with_activation(p.activation, p.negative_slope, [&](const auto& act) {
      args.residual ? forward<T, true>(p, args, begin, end, act) : forward<T, false>(p, args, begin, end, act);
    });
  });
}

// Calls call<kept>(act) for the combination at hand; only those that batch_norm_act.cpp asks for are compiled.
template <class Call>
void with_kept(const Problem& p, const Backward& args, const Call& call) {
  with_activation(p.activation, p.negative_slope, [&]<class Act>(const Act& act) {
    constexpr bool from_output = __is_same(Act, Relu) || __is_same(Act, LeakyRelu) || __is_same(Act, Relu6);
    constexpr bool from_residual = !__is_same(Act, Relu) && !__is_same(Act, Relu6) && !__is_same(Act, Identity);
    if (!args.kept) return call.template operator()<Kept::nothing>(act);
    if constexpr (from_output)
      if (args.kept_is_output) return call.template operator()<Kept::output>(act);
    if constexpr (from_residual) call.template operator()<Kept::residual>(act);
  });
}

void reduce_any(const Problem& p, const Backward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    with_kept(p, args, [&]<Kept kept>(const auto& act) { reduce<T, kept>(p, args, begin, end, act); });
  });
}

void backward_any(const Problem& p, const Backward& args, int64_t begin, int64_t end) {
  DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
    with_kept(p, args, [&]<Kept kept>(const auto& act) { backward<T, kept>(p, args, begin, end, act); });
  });
}

}  // namespace

const BatchNormActKernels batch_norm_act_kernels = {sample_any, statistics_any, forward_any, reduce_any, backward_any};

}  // namespace deepops::DEEPOPS_ISA
