// lstm_sequence on CUDA: memory of a call and its loop over steps.
#pragma once
#include "lstm/gpu_launches.h"

namespace deepops::isa_gpu::lstm {

struct Forward {
  const LstmShape& p;
  const LstmArguments& a;
  const Tensor &gates_x, &h0;
  bool save, all_c;
  Tensor h, c, h_n, c_n, gates, out, r, stats;

  Forward(const LstmShape& shape, const LstmArguments& arguments, const Tensor& x, const Tensor& h_first, bool saves,
          bool every_c)
      : p(shape),
        a(arguments),
        gates_x(x),
        h0(h_first),
        save(saves),
        all_c(saves || every_c),
        h(sequence(true, p, p.state, a.c0)),
        c(sequence(all_c, p, p.hidden, a.c0)),
        h_n(matrix(p.batch, p.state, a.c0)),
        c_n(matrix(p.batch, p.hidden, a.c0)),
        gates(sequence(save, p, p.gates(), a.c0)),
        out(sequence(save && p.projects, p, p.hidden, a.c0)),
        r(sequence(save && p.normalizes, p, p.gates(), a.c0)),
        stats(sums_sequence(save && p.normalizes, p, 4, a.c0)) {}

  // What the product reads is not the state of the step before: it is masked, or a row begins later than others.
  bool has_operand() const { return p.masks_hidden || (p.has_lengths && p.reverse); }
  // h is not just what comes out of the projection.
  bool finishes_state() const { return p.projects && (p.zoneout_h > 0 || p.masks_hidden || p.has_lengths); }

  template <class T>
  void run(gpu::Stream stream) const;
  template <class T>
  ForwardStep<T> step_of(int64_t t, int64_t before, const Tensor& operand) const;
  template <class T>
  StateStep<T> state_of(StateWork work, int64_t t, int64_t before, const Tensor& operand) const;
};

// before: the step before, or -1. What lies in memory for one step alone is set by run().
template <class T>
ForwardStep<T> Forward::step_of(int64_t t, int64_t before, const Tensor& operand) const {
  using A = OpMath<T>;
  const int64_t hidden = p.batch * p.hidden;
  ForwardStep<T> step{};
  step.formula = p;
  step.place = place_of(p, t, input<int64_t>(a.lengths));
  step.draws = draws_of(p, t, input<int64_t>(a.seed));
  step.projects = p.projects;
  step.gates_x = input<T>(gates_x) + t * 4 * hidden;
  step.x_stride = p.gates();
  step.h0 = input<T>(h0);
  step.c0 = input<T>(a.c0);
  step.h_before = before < 0 ? nullptr : input<T>(h) + before * p.batch * p.state;
  step.c_before = !all_c ? input<T>(c_n) : before < 0 ? nullptr : input<T>(c) + before * hidden;
  step.peephole = input<T>(a.weight_peephole);
  step.mask = input<T>(a.hidden_mask);
  step.weight_hh = input<T>(a.weight_ln_hh);
  step.weight_c = input<T>(a.weight_ln_c);
  step.bias_c = input<T>(a.bias_ln_c);
  step.eps = A(p.layer_norm_eps);
  step.stats = save && p.normalizes ? output<A>(stats) + t * p.batch * 4 : nullptr;
  step.gates = save ? output<T>(gates) + t * 4 * hidden : nullptr;
  step.h = output<T>(h) + t * p.batch * p.state;
  step.c = all_c ? output<T>(c) + t * hidden : output<T>(c_n);
  step.every_c = all_c;
  step.next = has_operand() && !p.projects ? output<T>(operand) : nullptr;
  step.h_n = output<T>(h_n);
  step.c_n = output<T>(c_n);
  return step;
}

template <class T>
StateStep<T> Forward::state_of(StateWork work, int64_t t, int64_t before, const Tensor& operand) const {
  const int64_t state = p.batch * p.state;
  StateStep<T> step{};
  step.work = work;
  step.formula = p;
  step.place = place_of(p, t, input<int64_t>(a.lengths));
  step.draws = draws_of(p, t, input<int64_t>(a.seed));
  step.h = output<T>(h) + t * state;
  step.h0 = input<T>(h0);
  step.h_before = before < 0 ? nullptr : input<T>(h) + before * state;
  step.mask = input<T>(a.hidden_mask);
  step.next = has_operand() ? output<T>(operand) : nullptr;
  step.h_n = output<T>(h_n);
  step.packs = on_packs(p.state, sizeof(T), {step.h, step.h0, step.mask, step.next, step.h_n});
  return step;
}

template <class T>
void Forward::run(gpu::Stream stream) const {
  const Tensor operand = matrix_if(has_operand(), p.batch, p.state, a.c0);
  const Tensor product = matrix_if(!save || !p.normalizes, p.batch, p.gates(), a.c0);
  const Tensor projected = matrix_if(p.projects && !save, p.batch, p.hidden, a.c0);
  const bool packs =
      on_packs(p.hidden, sizeof(T),
               {input<T>(gates_x), input<T>(h0), input<T>(a.c0), input<T>(a.weight_peephole), input<T>(a.hidden_mask),
                input<T>(a.weight_ln_hh), input<T>(a.weight_ln_c), input<T>(a.bias_ln_c)});
  const Tensor weight_hh = transposed(a.weight_hh);
  const Tensor weight_hr = p.projects ? transposed(*a.weight_hr) : weight_hh;
  if (has_operand()) launch_state(state_of<T>(StateWork::open, p.step(0), -1, operand), stream);
  for (int64_t n = 0; n < p.steps; ++n) {
    const int64_t t = p.step(n), before = n == 0 ? -1 : p.step(n - 1);
    const Tensor r_now = save && p.normalizes ? view(r, t * p.batch * p.gates(), p.batch, p.gates()) : product;
    const Tensor h_before = n == 0 ? h0 : view(h, before * p.batch * p.state, p.batch, p.state);
    gpu::multiply(r_now, has_operand() ? operand : h_before, weight_hh);
    const Tensor out_now = !p.projects ? product
                           : save      ? view(out, t * p.batch * p.hidden, p.batch, p.hidden)
                                       : projected;
    ForwardStep<T> step = step_of<T>(t, before, operand);
    step.product = input<T>(r_now);
    if (p.projects) step.h = output<T>(out_now);
    launch_forward(step, packs, p.normalizes, stream);
    if (!p.projects) continue;
    gpu::multiply(view(h, t * p.batch * p.state, p.batch, p.state), out_now, weight_hr);
    if (finishes_state() || n == p.steps - 1) launch_state(state_of<T>(StateWork::forward, t, before, operand), stream);
  }
}

}  // namespace deepops::isa_gpu::lstm
