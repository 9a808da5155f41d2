// Host side of lstm_sequence on every device: what a call says, and whether its tensors fit together.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <optional>

#include "core/checks.h"
#include "lstm/lstm.h"

namespace deepops {

using core::DataType;
using core::ScalarType;
using core::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments that the op and its backward have in common.
struct LstmArguments {
  const Tensor &c0, &weight_hh;
  const OptionalTensor &weight_hr, &weight_peephole, &weight_ln_hh, &weight_ln_c, &bias_ln_c;
  const OptionalTensor &hidden_mask, &lengths, &seed;
  bool reverse;
  std::optional<double> cell_clip;
  double layer_norm_eps, zoneout_h, zoneout_c, recurrent_dropout;
  int64_t first_step;
};

// Contiguous, of these sizes and this type, on the device of `like`.
inline void check_dense(const Tensor& tensor, std::initializer_list<int64_t> sizes, ScalarType type, const Tensor& like,
                        const char* op, const char* name) {
  core::check_same_device(tensor, like, op, name);
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": ", name, " has the wrong dtype");
  bool same = tensor.dim() == int64_t(sizes.size()) && tensor.is_contiguous();
  int64_t d = 0;
  for (const int64_t size : sizes) same = same && tensor.size(d++) == size;
  STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape, or is not contiguous");
}
inline void check_dense(const OptionalTensor& tensor, std::initializer_list<int64_t> sizes, ScalarType type,
                        const Tensor& like, const char* op, const char* name) {
  if (tensor.has_value()) check_dense(*tensor, sizes, type, like, op, name);
}

inline void check_probability(double p, const char* op, const char* name) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, op, ": ", name, " must be between 0 and 1, not ", p);
}

// What a step does beyond the plain formula, in a sequence and in a cell.
inline void set_formula(LstmFormula& formula, const OptionalTensor& weight_peephole, std::optional<double> cell_clip,
                        const char* op) {
  formula.peephole = weight_peephole.has_value();
  formula.clips = cell_clip.has_value();
  formula.cell_clip = cell_clip.value_or(0);
  STD_TORCH_CHECK(formula.cell_clip >= 0, op, ": cell_clip must not be negative");
}

// sequence: [T, B, ..], for the first two sizes.
inline LstmShape lstm_shape_of(const Tensor& sequence, const LstmArguments& a, const char* op) {
  STD_TORCH_CHECK(sequence.dim() == 3, op, ": gates must be [T, B, 4H]");
  STD_TORCH_CHECK(a.c0.dim() == 2 && a.weight_hh.dim() == 2, op, ": c0 must be [B, H], weight_hh [4H, R]");
  LstmShape p{};
  p.dtype = core::data_type_of(a.c0, op, "c0");
  p.steps = sequence.size(0);
  p.batch = sequence.size(1);
  p.hidden = a.c0.size(1);
  p.state = a.weight_hh.size(1);
  p.projects = a.weight_hr.has_value();
  p.normalizes = a.weight_ln_hh.has_value();
  p.masks_hidden = a.hidden_mask.has_value();
  p.has_lengths = a.lengths.has_value();
  set_formula(p, a.weight_peephole, a.cell_clip, op);
  p.random = a.seed.has_value();
  p.drops = p.random && a.recurrent_dropout > 0;
  p.zoneout_h = a.zoneout_h;
  p.zoneout_c = a.zoneout_c;
  p.recurrent_dropout = a.recurrent_dropout;
  p.reverse = a.reverse;
  p.layer_norm_eps = a.layer_norm_eps;
  p.first_step = a.first_step;

  const ScalarType type = a.c0.scalar_type();
  STD_TORCH_CHECK(p.hidden >= 1 && p.state >= 1, op, ": c0 and weight_hh must have units");
  STD_TORCH_CHECK(p.projects || p.state == p.hidden, op, ": weight_hh must be [4H, H] without weight_hr");
  check_dense(a.c0, {p.batch, p.hidden}, type, a.c0, op, "c0");
  check_dense(a.weight_hh, {p.gates(), p.state}, type, a.c0, op, "weight_hh");
  check_dense(a.weight_hr, {p.state, p.hidden}, type, a.c0, op, "weight_hr");
  check_dense(a.weight_peephole, {3 * p.hidden}, type, a.c0, op, "weight_peephole");
  STD_TORCH_CHECK(a.weight_ln_c.has_value() == p.normalizes && a.bias_ln_c.has_value() == p.normalizes, op,
                  ": weight_ln_hh, weight_ln_c and bias_ln_c come together");
  check_dense(a.weight_ln_hh, {p.gates()}, type, a.c0, op, "weight_ln_hh");
  check_dense(a.weight_ln_c, {p.hidden}, type, a.c0, op, "weight_ln_c");
  check_dense(a.bias_ln_c, {p.hidden}, type, a.c0, op, "bias_ln_c");
  check_dense(a.hidden_mask, {p.batch, p.state}, type, a.c0, op, "hidden_mask");
  check_dense(a.lengths, {p.batch}, ScalarType::Long, a.c0, op, "lengths");
  check_dense(a.seed, {1}, ScalarType::Long, a.c0, op, "seed");
  STD_TORCH_CHECK(p.first_step >= 0, op, ": first_step must not be negative");
  check_probability(p.zoneout_h, op, "zoneout_h");
  check_probability(p.zoneout_c, op, "zoneout_c");
  check_probability(p.recurrent_dropout, op, "recurrent_dropout");
  return p;
}

// gates_type: of gates_x, which is wider than the data on the CPU.
inline void check_forward(const LstmShape& p, const Tensor& gates_x, ScalarType gates_type, const Tensor& h0,
                          const Tensor& c0, const char* op) {
  check_dense(gates_x, {p.steps, p.batch, p.gates()}, gates_type, c0, op, "gates_x");
  check_dense(h0, {p.batch, p.state}, c0.scalar_type(), c0, op, "h0");
}

// Those of the states, as far as they are given.
struct LstmStateGradients {
  const OptionalTensor &h, &c, &h_n, &c_n;
};
inline void check_backward(const LstmShape& p, const LstmStateGradients& grads, const Tensor& gates, const Tensor& c,
                           const Tensor& r, const Tensor& stats, const Tensor& c0, const char* op) {
  const ScalarType type = c0.scalar_type();
  check_dense(gates, {p.steps, p.batch, p.gates()}, type, c0, op, "gates");
  check_dense(c, {p.steps, p.batch, p.hidden}, type, c0, op, "c");
  check_dense(grads.h, {p.steps, p.batch, p.state}, type, c0, op, "grad_h");
  check_dense(grads.c, {p.steps, p.batch, p.hidden}, type, c0, op, "grad_c");
  check_dense(grads.h_n, {p.batch, p.state}, type, c0, op, "grad_h_n");
  check_dense(grads.c_n, {p.batch, p.hidden}, type, c0, op, "grad_c_n");
  if (!p.normalizes) return;
  check_dense(r, {p.steps, p.batch, p.gates()}, type, c0, op, "r");
  check_dense(stats, {p.steps, p.batch, 4}, core::opmath_scalar_type(p.dtype), c0, op, "stats");
}

}  // namespace deepops
