// lstm_sequence_backward on CUDA: memory of a call and its loop over steps.
#pragma once
#include "lstm/gpu_launches.h"
// after gpu.cuh
#include <torch/csrc/stable/ops.h>

namespace deepops::isa_gpu::lstm {

// A gradient that is not given is 0.
inline void copy_or_zero(Tensor& to, const OptionalTensor& from) {
  if (from.has_value()) {
    torch::stable::copy_(to, *from);
  } else {
    torch::stable::zero_(to);
  }
}

struct Backward {
  const LstmShape& p;
  const LstmArguments& a;
  const OptionalTensor &grad_h, &grad_c, &grad_h_n, &grad_c_n;
  const Tensor &gates, &c, &r, &stats;
  Tensor grad_gates, grad_r, grad_out, grad_h0, grad_c0;
  Tensor grad_peephole, grad_ln_hh, grad_ln_c, grad_bias_ln_c;
  // Memory while it runs: for the products, what zoneout sends past a step, and what becomes the small gradients.
  Tensor product, projected, past, peephole_sums, norm_sums;

  Backward(const LstmShape& shape, const LstmArguments& arguments, const OptionalTensor& of_h,
           const OptionalTensor& of_c, const OptionalTensor& of_h_n, const OptionalTensor& of_c_n, const Tensor& gates_,
           const Tensor& c_, const Tensor& r_, const Tensor& stats_)
      : p(shape),
        a(arguments),
        grad_h(of_h),
        grad_c(of_c),
        grad_h_n(of_h_n),
        grad_c_n(of_c_n),
        gates(gates_),
        c(c_),
        r(r_),
        stats(stats_),
        grad_gates(sequence(true, p, p.gates(), a.c0)),
        grad_r(sequence(p.normalizes, p, p.gates(), a.c0)),
        grad_out(sequence(p.projects, p, p.state, a.c0)),
        grad_h0(matrix(p.batch, p.state, a.c0)),
        grad_c0(matrix(p.batch, p.hidden, a.c0)),
        grad_peephole(sums(p.peephole, 3)),
        grad_ln_hh(sums(p.normalizes, 4)),
        grad_ln_c(sums(p.normalizes, 1)),
        grad_bias_ln_c(sums(p.normalizes, 1)),
        product(matrix(p.batch, p.state, a.c0)),
        projected(matrix_if(p.projects, p.batch, p.hidden, a.c0)),
        past(matrix_if(p.zoneout_h > 0, p.batch, p.state, a.c0)),
        peephole_sums(sums(p.peephole, 3 * p.batch)),
        norm_sums(sums(p.normalizes, 6 * p.batch)) {}

  Tensor sums(bool wanted, int64_t rows) const {
    return core::empty_vector(wanted ? rows * p.hidden : 0, core::opmath_scalar_type(p.dtype), a.c0);
  }
  void clear() {
    for (Tensor* tensor : {&grad_peephole, &grad_ln_hh, &grad_ln_c, &grad_bias_ln_c}) torch::stable::zero_(*tensor);
  }

  // What goes into the projection's backward is grad_h and the product that comes from the step after, and no more: the
  // product is added to a copy of grad_h.
  bool adds_to_grad_h() const { return p.projects && p.zoneout_h == 0 && !p.masks_hidden && !p.has_lengths; }

  template <class T>
  void run(gpu::Stream stream) const;
  template <class T>
  StateGradient<T> gradient_of_state(bool first) const {
    return {first ? nullptr : input<T>(product), input<T>(a.hidden_mask), input<T>(grad_h_n),
            p.zoneout_h > 0 ? output<T>(past) : nullptr, output<T>(grad_h0)};
  }
  template <class T>
  BackwardStep<T> step_of(int64_t t, int64_t before, bool first) const;
  template <class T>
  StateStep<T> state_of(StateWork work, int64_t t, bool first) const;
};

template <class T>
BackwardStep<T> Backward::step_of(int64_t t, int64_t before, bool first) const {
  using A = OpMath<T>;
  const int64_t hidden = p.batch * p.hidden;
  BackwardStep<T> step{};
  step.formula = p;
  step.place = place_of(p, t, input<int64_t>(a.lengths));
  step.draws = draws_of(p, t, input<int64_t>(a.seed));
  step.projects = p.projects;
  step.grad_out = p.projects ? input<T>(projected) : at(input<T>(grad_h), t * hidden);
  step.state = gradient_of_state<T>(first);
  step.grad_c = at(input<T>(grad_c), t * hidden);
  step.grad_c_n = input<T>(grad_c_n);
  step.grad_c0 = output<T>(grad_c0);
  step.gates = input<T>(gates) + t * 4 * hidden;
  step.c_before = before < 0 ? nullptr : input<T>(c) + before * hidden;
  step.c0 = input<T>(a.c0);
  step.peephole = input<T>(a.weight_peephole);
  step.weight_hh = input<T>(a.weight_ln_hh);
  step.weight_c = input<T>(a.weight_ln_c);
  step.bias_c = input<T>(a.bias_ln_c);
  step.grad_gates = output<T>(grad_gates) + t * 4 * hidden;
  if (p.normalizes) {
    step.product = input<T>(r) + t * 4 * hidden;
    step.stats = input<A>(stats) + t * p.batch * 4;
    step.grad_r = output<T>(grad_r) + t * 4 * hidden;
    step.norm_sums = output<A>(norm_sums);
  }
  step.peephole_sums = p.peephole ? output<A>(peephole_sums) : nullptr;
  step.adds = !first;
  return step;
}

template <class T>
StateStep<T> Backward::state_of(StateWork work, int64_t t, bool first) const {
  const int64_t state = p.batch * p.state;
  StateStep<T> step{};
  step.work = work;
  step.formula = p;
  step.place = place_of(p, t, input<int64_t>(a.lengths));
  step.draws = draws_of(p, t, input<int64_t>(a.seed));
  step.state = gradient_of_state<T>(first);
  if (work == StateWork::backward) {
    step.h = output<T>(grad_out) + t * state;
    step.grad_h = at(input<T>(grad_h), t * state);
  }
  const StateGradient<T>& s = step.state;
  step.packs = on_packs(p.state, sizeof(T), {step.h, step.grad_h, s.product, s.mask, s.h_n, s.old, s.h0});
  return step;
}

template <class T>
void Backward::run(gpu::Stream stream) const {
  using A = OpMath<T>;
  const bool packs =
      on_packs(p.hidden, sizeof(T),
               {input<T>(grad_h), input<T>(grad_c), input<T>(grad_h_n), input<T>(grad_c_n), input<T>(gates),
                input<T>(c), input<T>(r), input<T>(a.c0), input<T>(a.weight_peephole), input<T>(a.weight_ln_hh),
                input<T>(a.weight_ln_c), input<T>(a.bias_ln_c), input<T>(a.hidden_mask)});
  Tensor into_projection = grad_out;
  if (adds_to_grad_h()) copy_or_zero(into_projection, grad_h);
  for (int64_t n = p.steps - 1; n >= 0; --n) {
    const int64_t t = p.step(n), before = n == 0 ? -1 : p.step(n - 1);
    const bool first = n == p.steps - 1;
    if (p.projects) {
      if (first || !adds_to_grad_h()) launch_state(state_of<T>(StateWork::backward, t, first), stream);
      gpu::multiply(projected, view(grad_out, t * p.batch * p.state, p.batch, p.state), *a.weight_hr);
    }
    const BackwardStep<T> step = step_of<T>(t, before, first);
    launch_backward(step, packs, p.normalizes, stream);
    const Tensor grad = view(p.normalizes ? grad_r : grad_gates, t * p.batch * p.gates(), p.batch, p.gates());
    if (n == 0 || !adds_to_grad_h()) {
      gpu::multiply(product, grad, a.weight_hh);
      continue;
    }
    gpu::multiply_add(view(grad_out, before * p.batch * p.state, p.batch, p.state), grad, a.weight_hh);
  }
  launch_state(state_of<T>(StateWork::close, p.reverse ? p.steps : -1, false), stream);
  const auto finish = [&](const Tensor& from, int64_t first, int64_t count, const Tensor& to) {
    launch_column_sums<T>(input<A>(from) + first * p.batch * p.hidden, count, p, packs, output<A>(to), stream);
  };
  if (p.peephole) finish(peephole_sums, 0, 3, grad_peephole);
  if (!p.normalizes) return;
  finish(norm_sums, 0, 4, grad_ln_hh);
  finish(norm_sums, 4, 1, grad_ln_c);
  finish(norm_sums, 5, 1, grad_bias_ln_c);
}

}  // namespace deepops::isa_gpu::lstm
