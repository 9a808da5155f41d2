// lstm_sequence and its backward on the CPU: checks, allocation, threads, registration.
//
// Each direction is one parallel region.
#include "lstm/lstm.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "core/allocate.h"
#include "core/memory_pool.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "lstm/host.h"
#include "lstm/panels.h"

namespace deepops {
namespace {

using core::Scratch;

const LstmKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(lstm_kernels); }

// Results, contiguous and uninitialised; of nothing where they are not wanted.
class Results {
 public:
  Results(const LstmShape& p, const Tensor& data) : p_(p), data_(data) {
    sums_ = core::empty_vector(0, core::opmath_scalar_type(p.dtype), data);
  }
  Tensor sequence(bool wanted, int64_t size) const { return sequence(wanted, size, data_); }
  Tensor sums_sequence(bool wanted, int64_t size) const { return sequence(wanted, size, *sums_); }
  Tensor rows(int64_t size) const {
    const int64_t sizes[] = {p_.batch, size}, strides[] = {size, 1};
    return core::empty({sizes, 2}, {strides, 2}, data_);
  }
  Tensor sums_vector(bool wanted, int64_t size) const {
    return core::empty_vector(wanted ? size : 0, core::opmath_scalar_type(p_.dtype), data_);
  }

 private:
  Tensor sequence(bool wanted, int64_t size, const Tensor& like) const {
    if (!wanted) return core::empty_vector(0, like.scalar_type(), like);
    const int64_t sizes[] = {p_.steps, p_.batch, size}, strides[] = {p_.batch * size, size, 1};
    return core::pooled_empty({sizes, 3}, {strides, 3}, like);
  }
  const LstmShape& p_;
  const Tensor& data_;
  std::optional<Tensor> sums_;
};

void* data_if(bool wanted, Tensor& tensor) { return wanted ? tensor.mutable_data_ptr() : nullptr; }

// Memory for sums.
class Sums {
 public:
  Sums(const LstmShape& p, Scratch& scratch) : is_double_(p.dtype == DataType::f64), scratch_(scratch) {}
  void* take(bool wanted, int64_t count) const {
    if (!wanted) return nullptr;
    return is_double_ ? static_cast<void*>(scratch_.take<double>(count).data()) : scratch_.take<float>(count).data();
  }

 private:
  const bool is_double_;
  Scratch& scratch_;
};

LstmRawWeights raw_weights(const LstmArguments& a) {
  return {a.weight_hh.const_data_ptr(),       core::data_or_null(a.weight_hr),   core::data_or_null(a.weight_peephole),
          core::data_or_null(a.weight_ln_hh), core::data_or_null(a.weight_ln_c), core::data_or_null(a.bias_ln_c)};
}

LstmInputs inputs_of(const LstmShape& p, const LstmArguments& a, bool forward, const char* op, const Sums& sums) {
  LstmInputs in{};
  const int64_t gates = forward ? unit_blocks_of(p.hidden) * p.state : panels_of(p.state) * p.gates();
  const int64_t projection = forward ? panels_of(p.state) * p.hidden : panels_of(p.hidden) * p.state;
  in.weights.gates = sums.take(true, gates * kPanelColumns);
  in.weights.projection = sums.take(p.projects, projection * kPanelColumns);
  in.weights.peephole = sums.take(p.peephole, 3 * p.hidden_stride());
  in.weights.ln_hh = sums.take(p.normalizes, 4 * p.hidden_stride());
  in.weights.ln_c = sums.take(p.normalizes, p.hidden_stride());
  in.weights.bias_ln_c = sums.take(p.normalizes, p.hidden_stride());
  in.c0 = a.c0.const_data_ptr();
  in.hidden_mask = core::data_or_null(a.hidden_mask);
  in.lengths = static_cast<const int64_t*>(core::data_or_null(a.lengths));
  for (int64_t row = 0; in.lengths && row < p.batch; ++row)
    STD_TORCH_CHECK(in.lengths[row] >= 0 && in.lengths[row] <= p.steps, op, ": lengths must be between 0 and ", p.steps,
                    ", not ", in.lengths[row]);
  if (p.random) in.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(a.seed->const_data_ptr()));
  return in;
}

// pass(begin, end) over the groups of sequences, by as many threads as pay.
template <class Pass>
void run(const LstmShape& p, const Pass& pass) {
  const int64_t work = p.steps * p.batch * p.gates() * (p.state + 64);
  core::divide(core::workers_for(work, core::kMultiplyAddsPerThread, p.groups()), p.groups(),
               [&](int64_t, int64_t begin, int64_t end) { pass(begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sequence_cpu(
    Tensor gates_x, Tensor h0, Tensor c0, Tensor weight_hh, OptionalTensor weight_hr, OptionalTensor weight_peephole,
    OptionalTensor weight_ln_hh, OptionalTensor weight_ln_c, OptionalTensor bias_ln_c, OptionalTensor hidden_mask,
    OptionalTensor lengths, OptionalTensor seed, bool reverse, std::optional<double> cell_clip, double layer_norm_eps,
    double zoneout_h, double zoneout_c, double recurrent_dropout, int64_t first_step, bool save, bool all_c) {
  constexpr const char* kOp = "lstm_sequence";
  const LstmArguments a{
      c0,   weight_hh, weight_hr, weight_peephole, weight_ln_hh, weight_ln_c, bias_ln_c,         hidden_mask, lengths,
      seed, reverse,   cell_clip, layer_norm_eps,  zoneout_h,    zoneout_c,   recurrent_dropout, first_step};
  const LstmShape p = lstm_shape_of(gates_x, a, kOp);
  core::check_cpu(c0, kOp, "c0");
  check_forward(p, gates_x, core::opmath_scalar_type(p.dtype), h0, c0, kOp);
  Scratch scratch;
  const Sums sums(p, scratch);
  LstmForward args{};
  static_cast<LstmInputs&>(args) = inputs_of(p, a, true, kOp, sums);

  const Results results(p, c0);
  Tensor h = results.sequence(true, p.state), c = results.sequence(save || all_c, p.hidden);
  Tensor h_n = results.rows(p.state), c_n = results.rows(p.hidden);
  Tensor gates = results.sequence(save, p.gates()), out = results.sequence(save && p.projects, p.hidden);
  Tensor r = results.sequence(save && p.normalizes, p.gates());
  Tensor stats = results.sums_sequence(save && p.normalizes, 4);
  args.gates_x = gates_x.const_data_ptr();
  args.h0 = h0.const_data_ptr();
  args.h = h.mutable_data_ptr();
  args.c = data_if(save || all_c, c);
  args.h_n = h_n.mutable_data_ptr();
  args.c_n = c_n.mutable_data_ptr();
  args.gates = data_if(save, gates);
  args.out = data_if(save && p.projects, out);
  args.r = data_if(save && p.normalizes, r);
  args.stats = data_if(save && p.normalizes, stats);
  const int64_t hidden = p.batch * p.hidden_stride(), state = p.batch * p.state_stride();
  args.operand = sums.take(true, 2 * state);
  args.h_state = sums.take(p.masks_hidden, state);
  args.c_state = sums.take(true, hidden);
  args.row_out = sums.take(p.normalizes || p.projects, hidden);
  args.row_cell = sums.take(p.normalizes, hidden);
  args.row_gates = sums.take(p.normalizes, 4 * hidden);
  kernels().pack_forward(p, raw_weights(a), args.weights);
  const int64_t rows = p.rows_per_group();
  run(p, [&](int64_t begin, int64_t end) { kernels().forward(p, args, begin * rows, std::min(end * rows, p.batch)); });
  return {h, c, h_n, c_n, gates, out, r, stats};
}

// Adds up what the groups have left in `small`, in their order.
template <class S>
void add_groups(const LstmShape& p, const double* small, int64_t size, int64_t from, int64_t parts, Tensor& to) {
  auto* const sums = static_cast<S*>(to.mutable_data_ptr());
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t unit = 0; unit < p.hidden; ++unit) {
      double sum = 0;
      for (int64_t group = 0; group < p.groups(); ++group)
        sum += small[group * size + from + part * p.hidden_stride() + unit];
      sums[part * p.hidden + unit] = S(sum);
    }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sequence_backward_cpu(
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
  core::check_cpu(c0, kOp, "c0");
  check_backward(p, {grad_h, grad_c, grad_h_n, grad_c_n}, gates, c, r, stats, c0, kOp);
  Scratch scratch;
  const Sums sums(p, scratch);
  LstmBackward args{};
  static_cast<LstmInputs&>(args) = inputs_of(p, a, false, kOp, sums);

  const Results results(p, c0);
  Tensor grad_gates = results.sums_sequence(true, p.gates()), grad_r = results.sums_sequence(p.normalizes, p.gates());
  Tensor grad_out = results.sums_sequence(p.projects, p.state);
  Tensor grad_h0 = results.rows(p.state), grad_c0 = results.rows(p.hidden);
  args.grad_h = core::data_or_null(grad_h);
  args.grad_c = core::data_or_null(grad_c);
  args.grad_h_n = core::data_or_null(grad_h_n);
  args.grad_c_n = core::data_or_null(grad_c_n);
  args.gates = gates.const_data_ptr();
  args.c = c.const_data_ptr();
  args.r = p.normalizes ? r.const_data_ptr() : nullptr;
  args.stats = p.normalizes ? stats.const_data_ptr() : nullptr;
  args.grad_gates = grad_gates.mutable_data_ptr();
  args.grad_r = data_if(p.normalizes, grad_r);
  args.grad_out = data_if(p.projects, grad_out);
  args.grad_h0 = grad_h0.mutable_data_ptr();
  args.grad_c0 = grad_c0.mutable_data_ptr();
  const int64_t hidden = p.batch * p.hidden_stride(), state = p.batch * p.state_stride();
  args.grad_state = sums.take(true, state);
  args.grad_cell = sums.take(true, hidden);
  args.row_out = sums.take(p.projects, hidden);
  args.row_o = sums.take(p.normalizes, hidden);
  args.row_shown = sums.take(p.normalizes, hidden);
  const LstmSmall small(p);
  const std::span<double> small_sums = scratch.take<double>(p.groups() * small.size);
  std::fill(small_sums.begin(), small_sums.end(), 0.0);
  args.small = small_sums.data();
  kernels().pack_backward(p, raw_weights(a), args.weights);
  run(p, [&](int64_t begin, int64_t end) { kernels().backward(p, args, begin, end); });

  Tensor grad_peephole = results.sums_vector(p.peephole, 3 * p.hidden);
  Tensor grad_ln_hh = results.sums_vector(p.normalizes, p.gates());
  Tensor grad_ln_c = results.sums_vector(p.normalizes, p.hidden);
  Tensor grad_bias_ln_c = results.sums_vector(p.normalizes, p.hidden);
  const auto give = [&](bool wanted, int64_t from, int64_t parts, Tensor& to) {
    if (!wanted) return;
    p.dtype == DataType::f64 ? add_groups<double>(p, args.small, small.size, from, parts, to)
                             : add_groups<float>(p, args.small, small.size, from, parts, to);
  };
  give(p.peephole, small.peephole, 3, grad_peephole);
  give(p.normalizes, small.ln_hh, 4, grad_ln_hh);
  give(p.normalizes, small.ln_c, 1, grad_ln_c);
  give(p.normalizes, small.bias_ln_c, 1, grad_bias_ln_c);
  return {grad_gates, grad_r, grad_out, grad_h0, grad_c0, grad_peephole, grad_ln_hh, grad_ln_c, grad_bias_ln_c};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("lstm_sequence", TORCH_BOX(&deepops::sequence_cpu));
  m.impl("lstm_sequence_backward", TORCH_BOX(&deepops::sequence_backward_cpu));
}
