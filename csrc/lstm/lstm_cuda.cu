// The LSTM ops on CUDA: the loop over steps, allocation, registration.
//
// A step is the recurrent product by torch and one pointwise kernel; with a projection its product too and, where h is
// not final then, one more kernel. The loop allocates nothing on the device and reads nothing from it: a graph can
// capture it.
#include "core/gpu.cuh"
// after gpu.cuh
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "lstm/gpu_cell.h"
#include "lstm/gpu_launches.h"

namespace deepops::isa_gpu::lstm {
namespace {

// Results [T, B, size], uninitialised; of nothing where they are not wanted.
Tensor sequence(bool wanted, const LstmShape& p, int64_t size, const Tensor& like) {
  if (!wanted) return core::empty_vector(0, like.scalar_type(), like);
  const int64_t sizes[] = {p.steps, p.batch, size}, strides[] = {p.batch * size, size, 1};
  return core::empty({sizes, 3}, {strides, 3}, like);
}
// In the type of sums.
Tensor sums_sequence(bool wanted, const LstmShape& p, int64_t size, const Tensor& like) {
  return sequence(wanted, p, size, core::empty_vector(0, core::opmath_scalar_type(p.dtype), like));
}

// ---- forward --------------------------------------------------------------------------------------------------------

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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sequence_forward(
    Tensor gates_x, Tensor h0, Tensor c0, Tensor weight_hh, OptionalTensor weight_hr, OptionalTensor weight_peephole,
    OptionalTensor weight_ln_hh, OptionalTensor weight_ln_c, OptionalTensor bias_ln_c, OptionalTensor hidden_mask,
    OptionalTensor lengths, OptionalTensor seed, bool reverse, std::optional<double> cell_clip, double layer_norm_eps,
    double zoneout_h, double zoneout_c, double recurrent_dropout, int64_t first_step, bool save, bool all_c) {
  constexpr const char* kOp = "lstm_sequence";
  const LstmArguments a{
      c0,   weight_hh, weight_hr, weight_peephole, weight_ln_hh, weight_ln_c, bias_ln_c,         hidden_mask, lengths,
      seed, reverse,   cell_clip, layer_norm_eps,  zoneout_h,    zoneout_c,   recurrent_dropout, first_step};
  const LstmShape p = lstm_shape_of(gates_x, a, kOp);
  STD_TORCH_CHECK(gpu::on_gpu(c0), kOp, ": c0 must be on the GPU");
  check_dense(gates_x, {p.steps, p.batch, p.gates()}, c0.scalar_type(), c0, kOp, "gates_x");
  check_dense(h0, {p.batch, p.state}, c0.scalar_type(), c0, kOp, "h0");
  check_size(p.batch, std::max(p.hidden, p.state), kOp);
  const gpu::Device device(c0);
  Forward call(p, a, gates_x, h0, save, all_c);
  if (p.steps == 0) {
    torch::stable::copy_(call.h_n, h0);
    torch::stable::copy_(call.c_n, c0);
  } else if (p.batch > 0) {
    DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { call.run<T>(device.stream()); })
  }
  return {call.h, call.c, call.h_n, call.c_n, call.gates, call.out, call.r, call.stats};
}

// ---- backward -------------------------------------------------------------------------------------------------------

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
  for (int64_t n = p.steps - 1; n >= 0; --n) {
    const int64_t t = p.step(n), before = n == 0 ? -1 : p.step(n - 1);
    const bool first = n == p.steps - 1;
    if (p.projects) {
      launch_state(state_of<T>(StateWork::backward, t, first), stream);
      gpu::multiply(projected, view(grad_out, t * p.batch * p.state, p.batch, p.state), *a.weight_hr);
    }
    const BackwardStep<T> step = step_of<T>(t, before, first);
    launch_backward(step, packs, p.normalizes, stream);
    gpu::multiply(product, view(p.normalizes ? grad_r : grad_gates, t * p.batch * p.gates(), p.batch, p.gates()),
                  a.weight_hh);
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

// What came for the last state, or 0.
void copy_or_zero(Tensor& to, const OptionalTensor& from) {
  if (from.has_value()) {
    torch::stable::copy_(to, *from);
  } else {
    torch::stable::zero_(to);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sequence_backward(
    OptionalTensor grad_h, OptionalTensor grad_c, OptionalTensor grad_h_n, OptionalTensor grad_c_n, Tensor gates,
    Tensor c, Tensor r, Tensor stats, Tensor c0, Tensor weight_hh, OptionalTensor weight_hr,
    OptionalTensor weight_peephole, OptionalTensor weight_ln_hh, OptionalTensor weight_ln_c, OptionalTensor bias_ln_c,
    OptionalTensor hidden_mask, OptionalTensor lengths, OptionalTensor seed, bool reverse,
    std::optional<double> cell_clip, double layer_norm_eps, double zoneout_h, double zoneout_c,
    double recurrent_dropout, int64_t first_step) {
  constexpr const char* kOp = "lstm_sequence_backward";
  const LstmArguments a{
      c0,   weight_hh, weight_hr, weight_peephole, weight_ln_hh, weight_ln_c, bias_ln_c,         hidden_mask, lengths,
      seed, reverse,   cell_clip, layer_norm_eps,  zoneout_h,    zoneout_c,   recurrent_dropout, first_step};
  const LstmShape p = lstm_shape_of(gates, a, kOp);
  const ScalarType type = c0.scalar_type();
  STD_TORCH_CHECK(gpu::on_gpu(c0), kOp, ": c0 must be on the GPU");
  check_dense(gates, {p.steps, p.batch, p.gates()}, type, c0, kOp, "gates");
  check_dense(c, {p.steps, p.batch, p.hidden}, type, c0, kOp, "c");
  check_dense(grad_h, {p.steps, p.batch, p.state}, type, c0, kOp, "grad_h");
  check_dense(grad_c, {p.steps, p.batch, p.hidden}, type, c0, kOp, "grad_c");
  check_dense(grad_h_n, {p.batch, p.state}, type, c0, kOp, "grad_h_n");
  check_dense(grad_c_n, {p.batch, p.hidden}, type, c0, kOp, "grad_c_n");
  if (p.normalizes) {
    check_dense(r, {p.steps, p.batch, p.gates()}, type, c0, kOp, "r");
    check_dense(stats, {p.steps, p.batch, 4}, core::opmath_scalar_type(p.dtype), c0, kOp, "stats");
  }
  check_size(p.batch, std::max(p.hidden, p.state), kOp);
  const gpu::Device device(c0);
  Backward call(p, a, grad_h, grad_c, grad_h_n, grad_c_n, gates, c, r, stats);
  if (p.steps > 0 && p.batch > 0) {
    DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() { call.run<T>(device.stream()); })
  } else {
    call.clear();
    copy_or_zero(call.grad_h0, grad_h_n);
    copy_or_zero(call.grad_c0, grad_c_n);
  }
  return {call.grad_gates,    call.grad_r,     call.grad_out,  call.grad_h0,       call.grad_c0,
          call.grad_peephole, call.grad_ln_hh, call.grad_ln_c, call.grad_bias_ln_c};
}

}  // namespace
}  // namespace deepops::isa_gpu::lstm

DEEPOPS_GPU_LIBRARY_IMPL(m) {
  m.impl("lstm_sequence", TORCH_BOX(&deepops::isa_gpu::lstm::sequence_forward));
  m.impl("lstm_sequence_backward", TORCH_BOX(&deepops::isa_gpu::lstm::sequence_backward));
  m.impl("lstm_pack", TORCH_BOX(&deepops::isa_gpu::lstm::pack));
  m.impl("lstm_cell", TORCH_BOX(&deepops::isa_gpu::lstm::cell));
  m.impl("lstm_cell_backward", TORCH_BOX(&deepops::isa_gpu::lstm::cell_backward));
}
