// lstm_pack, lstm_cell, lstm_cell_backward on the CPU: checks, allocation, how the work is divided.
#include "lstm/cell.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "core/allocate.h"
#include "core/memory_pool.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "lstm/host.h"

namespace deepops {
namespace {

using core::Scratch;

const CellKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(cell_kernels); }

int64_t grain(int64_t least_work, int64_t work_per_item) {
  return (least_work + work_per_item - 1) / std::max<int64_t>(work_per_item, 1);
}

bool is_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}

void check_matrix(const Tensor& tensor, int64_t rows, int64_t columns, const Tensor& like, const char* op,
                  const char* name) {
  core::check_cpu(tensor, op, name);
  STD_TORCH_CHECK(is_matrix(tensor, rows, columns), op, ": ", name, " must be [", rows, ", ", columns, "]");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of the others");
}

// Rows as they are, or a copy where the values of a row are not adjacent. Kept alive by `keep`.
CellRows rows_of(const OptionalTensor& tensor, Tensor& keep) {
  if (!tensor.has_value()) return {nullptr, 0};
  const bool adjacent = tensor->stride(1) == 1 || tensor->size(1) <= 1;
  keep = adjacent ? *tensor : torch::stable::contiguous(*tensor);
  return {keep.const_data_ptr(), keep.stride(0)};
}

// The same in the type of sums.
CellRows sums_of(const CellShape& p, const Tensor& tensor, Tensor& keep, Scratch& scratch) {
  const CellRows rows = rows_of(tensor, keep);
  if (p.dtype <= DataType::f64) return rows;
  const int64_t columns = tensor.size(1);
  float* const wide = scratch.take<float>(p.batch * columns).data();
  kernels().widen(p.dtype, rows, p.batch, columns, wide);
  return {wide, columns};
}

void set_options(CellShape& p, const OptionalTensor& weight_peephole, std::optional<double> cell_clip,
                 const Tensor& like, const char* op) {
  set_formula(p, weight_peephole, cell_clip, op);
  core::check_vector(weight_peephole, 3 * p.hidden, like.scalar_type(), like, op, "weight_peephole");
}

void check_packed(const CellShape& p, const Tensor& packed, const char* op) {
  core::check_vector(packed, p.packed_size(), core::opmath_scalar_type(p.dtype), packed, op, "packed");
}

Tensor matrix_if(bool wanted, int64_t rows, int64_t columns, const Tensor& like) {
  return wanted ? core::pooled_matrix(rows, columns, like) : core::empty_vector(0, like.scalar_type(), like);
}

Tensor pack_cpu(Tensor weight_ih, Tensor weight_hh) {
  constexpr const char* kOp = "lstm_pack";
  CellShape p{};
  p.dtype = core::data_type_of(weight_hh, kOp, "weight_hh");
  STD_TORCH_CHECK(weight_hh.dim() == 2 && weight_hh.size(0) == 4 * weight_hh.size(1) && weight_hh.is_contiguous(), kOp,
                  ": weight_hh must be [4H, H], contiguous");
  p.hidden = weight_hh.size(1);
  STD_TORCH_CHECK(weight_ih.dim() == 2 && weight_ih.size(0) == p.gates() && weight_ih.is_contiguous(), kOp,
                  ": weight_ih must be [4H, I], contiguous, H that of weight_hh");
  STD_TORCH_CHECK(weight_ih.scalar_type() == weight_hh.scalar_type(), kOp,
                  ": weight_ih must have the dtype of weight_hh");
  core::check_cpu(weight_ih, kOp, "weight_ih");
  core::check_cpu(weight_hh, kOp, "weight_hh");
  p.input = weight_ih.size(1);
  const int64_t size = p.packed_size(), stride = 1;
  Tensor packed = p.dtype <= DataType::f64 ? core::pooled_empty({&size, 1}, {&stride, 1}, weight_hh)
                                           : core::empty_vector(size, core::ScalarType::Float, weight_hh);
  kernels().pack(p, weight_ih.const_data_ptr(), weight_hh.const_data_ptr(), packed.mutable_data_ptr());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> cell_cpu(Tensor x, Tensor h, Tensor c, Tensor packed, OptionalTensor bias,
                                            OptionalTensor weight_peephole, std::optional<double> cell_clip,
                                            bool save) {
  constexpr const char* kOp = "lstm_cell";
  CellShape p{};
  p.dtype = core::data_type_of(h, kOp, "h");
  STD_TORCH_CHECK(x.dim() == 2 && h.dim() == 2, kOp, ": x must be [B, I], h [B, H]");
  p.batch = h.size(0);
  p.hidden = h.size(1);
  p.input = x.size(1);
  core::check_cpu(h, kOp, "h");
  check_matrix(x, p.batch, p.input, h, kOp, "x");
  check_matrix(c, p.batch, p.hidden, h, kOp, "c");
  set_options(p, weight_peephole, cell_clip, h, kOp);
  core::check_vector(bias, p.gates(), core::opmath_scalar_type(p.dtype), h, kOp, "bias");
  check_packed(p, packed, kOp);

  Tensor new_h = core::pooled_matrix(p.batch, p.hidden, h), new_c = core::pooled_matrix(p.batch, p.hidden, h);
  Tensor gates = matrix_if(save, p.batch, p.gates(), h);
  Scratch scratch;
  Tensor keep_x = x, keep_h = h, keep_c = c;
  CellForward args{};
  args.x = sums_of(p, x, keep_x, scratch);
  args.h = sums_of(p, h, keep_h, scratch);
  args.c = rows_of(c, keep_c);
  args.packed = packed.const_data_ptr();
  args.bias = core::data_or_null(bias);
  args.peephole = core::data_or_null(weight_peephole);
  args.new_h = new_h.mutable_data_ptr();
  args.new_c = new_c.mutable_data_ptr();
  args.gates = save ? gates.mutable_data_ptr() : nullptr;
  const int64_t items = unit_blocks_of(p.hidden) * p.row_groups();
  const int64_t work = p.batch * (p.input + p.hidden + 32) * kPanelColumns / std::max<int64_t>(p.row_groups(), 1);
  core::parallel_for(items, grain(core::kMultiplyAddsPerThread, work),
                     [&](int64_t begin, int64_t end) { kernels().forward(p, args, begin, end); });
  return {new_h, new_c, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cell_backward_cpu(OptionalTensor grad_h, OptionalTensor grad_c,
                                                                     Tensor gates, Tensor c_before, Tensor packed,
                                                                     OptionalTensor weight_peephole,
                                                                     std::optional<double> cell_clip,
                                                                     int64_t input_size, bool need_x, bool need_h) {
  constexpr const char* kOp = "lstm_cell_backward";
  CellShape p{};
  p.dtype = core::data_type_of(c_before, kOp, "c_before");
  STD_TORCH_CHECK(c_before.dim() == 2, kOp, ": c_before must be [B, H]");
  STD_TORCH_CHECK(input_size >= 0, kOp, ": input_size must not be negative");
  p.batch = c_before.size(0);
  p.hidden = c_before.size(1);
  p.input = input_size;
  core::check_cpu(c_before, kOp, "c_before");
  check_matrix(gates, p.batch, p.gates(), c_before, kOp, "gates");
  STD_TORCH_CHECK(gates.is_contiguous(), kOp, ": gates must be contiguous");
  if (grad_h.has_value()) check_matrix(*grad_h, p.batch, p.hidden, c_before, kOp, "grad_h");
  if (grad_c.has_value()) check_matrix(*grad_c, p.batch, p.hidden, c_before, kOp, "grad_c");
  set_options(p, weight_peephole, cell_clip, c_before, kOp);
  check_packed(p, packed, kOp);

  Tensor grad_gates = core::pooled_matrix(p.batch, p.gates(), c_before),
         grad_new_c = core::pooled_matrix(p.batch, p.hidden, c_before);
  Tensor grad_x = matrix_if(need_x, p.batch, p.input, c_before);
  Tensor grad_new_h = matrix_if(need_h, p.batch, p.hidden, c_before);
  Tensor grad_peephole = core::empty_vector(p.peephole ? 3 * p.hidden : 0, core::opmath_scalar_type(p.dtype), c_before);
  Scratch scratch;
  Tensor keep_h = c_before, keep_c = c_before, keep_before = c_before;
  CellBackward args{};
  args.grad_h = rows_of(grad_h, keep_h);
  args.grad_c = rows_of(grad_c, keep_c);
  args.c_before = rows_of(c_before, keep_before);
  args.gates = gates.const_data_ptr();
  args.packed = packed.const_data_ptr();
  args.peephole = core::data_or_null(weight_peephole);
  args.grad_gates = grad_gates.mutable_data_ptr();
  args.grad_sums = p.dtype <= DataType::f64 ? args.grad_gates : scratch.take<float>(p.batch * p.gates()).data();
  args.grad_x = need_x ? grad_x.mutable_data_ptr() : nullptr;
  args.grad_new_h = need_h ? grad_new_h.mutable_data_ptr() : nullptr;
  args.grad_new_c = grad_new_c.mutable_data_ptr();
  args.grad_peephole = grad_peephole.mutable_data_ptr();
  core::parallel_for(p.batch, grain(core::kValuesPerThread, p.hidden),
                     [&](int64_t begin, int64_t end) { kernels().gate_gradients(p, args, begin, end); });
  if (p.peephole)
    core::parallel_for(unit_blocks_of(p.hidden), grain(core::kValuesPerThread, p.batch * kPanelUnits),
                       [&](int64_t begin, int64_t end) { kernels().peephole_gradients(p, args, begin, end); });
  const int64_t panels = (need_x ? panels_of(p.input) : 0) + (need_h ? panels_of(p.hidden) : 0);
  const int64_t work = p.batch * p.gates() * kPanelColumns / std::max<int64_t>(p.row_groups(), 1);
  core::parallel_for(panels * p.row_groups(), grain(core::kMultiplyAddsPerThread, work),
                     [&](int64_t begin, int64_t end) { kernels().input_gradients(p, args, begin, end); });
  return {grad_gates, grad_x, grad_new_h, grad_new_c, grad_peephole};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("lstm_pack", TORCH_BOX(&deepops::pack_cpu));
  m.impl("lstm_cell", TORCH_BOX(&deepops::cell_cpu));
  m.impl("lstm_cell_backward", TORCH_BOX(&deepops::cell_backward_cpu));
}
