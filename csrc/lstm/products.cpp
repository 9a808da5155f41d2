// _lstm_product and _lstm_weight_gradient on the CPU: checks, allocation, threads.
#include "lstm/products.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/checks.h"
#include "core/memory_pool.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace deepops {
namespace {

using core::DataType;
using core::Scratch;
using core::Tensor;

const ProductKernels& kernels() { return *DEEPOPS_CHOOSE_ISA(lstm_product_kernels); }

void* take(bool is_double, int64_t count, Scratch& scratch) {
  return is_double ? static_cast<void*>(scratch.take<double>(count).data()) : scratch.take<float>(count).data();
}

void check_matrix(const Tensor& tensor, const Tensor& like, const char* op, const char* name) {
  core::check_cpu(tensor, op, name);
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.is_contiguous(), op, ": ", name, " must be a contiguous matrix");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type() && core::data_type_of(tensor, op, name) <= DataType::f64,
                  op, ": ", name, " must be float32 or float64, as all others");
}

int64_t workers_for(int64_t work, int64_t items) {
  return core::workers_for(work, core::kMultiplyAddsPerThread, items);
}

Tensor product_cpu(Tensor a, Tensor weight, std::optional<Tensor> bias, bool transposed) {
  constexpr const char* kOp = "_lstm_product";
  check_matrix(a, a, kOp, "a");
  check_matrix(weight, a, kOp, "weight");
  const int64_t inner = transposed ? 1 : 0;
  STD_TORCH_CHECK(weight.size(inner) == a.size(1), kOp, ": weight does not fit a");
  RowsProduct p{};
  p.is_double = a.scalar_type() == core::ScalarType::Double;
  p.rows = a.size(0);
  p.size = a.size(1);
  p.columns = weight.size(1 - inner);
  core::check_vector(bias, p.columns, a.scalar_type(), a, kOp, "bias");
  Tensor out = core::pooled_matrix(p.rows, p.columns, a);
  Scratch scratch;
  const int64_t panels = panels_of(p.columns);
  p.panels = take(p.is_double, panels * p.size * kPanelColumns, scratch);
  p.a = a.const_data_ptr();
  p.bias = core::data_or_null(bias);
  p.out = out.mutable_data_ptr();
  const void* const weights = weight.const_data_ptr();
  // Packing costs as much as a few dozen multiply-adds of each value.
  core::divide(workers_for(64 * p.size * p.columns, panels), panels,
               [&](int64_t, int64_t begin, int64_t end) { kernels().pack(p, weights, transposed, begin, end); });
  core::divide(workers_for(p.rows * p.size * p.columns, p.rows), p.rows,
               [&](int64_t, int64_t begin, int64_t end) { kernels().rows(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> weight_gradient_cpu(Tensor grad, Tensor x, std::optional<Tensor> start, bool start_last,
                                               bool sums) {
  constexpr const char* kOp = "_lstm_weight_gradient";
  check_matrix(grad, grad, kOp, "grad");
  check_matrix(x, grad, kOp, "x");
  if (start.has_value()) {
    check_matrix(*start, grad, kOp, "start");
    STD_TORCH_CHECK(start->size(1) == x.size(1), kOp, ": start must have the columns of x");
  }
  const int64_t rows = x.size(0) + (start.has_value() ? start->size(0) : 0);
  STD_TORCH_CHECK(grad.size(0) == rows && rows > 0, kOp,
                  ": grad and x, with start, must have the same rows, at least one");
  OuterProduct p{};
  p.is_double = grad.scalar_type() == core::ScalarType::Double;
  p.size = grad.size(0);
  p.a_columns = grad.size(1);
  p.b_columns = x.size(1);
  Tensor out = core::pooled_matrix(p.a_columns, p.b_columns, grad);
  Tensor column_sums = core::empty_vector(sums ? p.a_columns : 0, grad.scalar_type(), grad);
  p.a = grad.const_data_ptr();
  p.b[start_last ? 0 : 1] = {x.const_data_ptr(), x.size(0)};
  p.b[start_last ? 1 : 0] = {core::data_or_null(start), rows - x.size(0)};
  p.out = out.mutable_data_ptr();
  const int64_t items = panels_of(p.a_columns);
  const int64_t workers = workers_for(p.size * p.a_columns * p.b_columns, items);
  const int64_t each = p.work_size((items + workers - 1) / workers), bytes = p.is_double ? 8 : 4;
  Scratch scratch;
  p.work = take(p.is_double, workers * each, scratch);
  if (sums) {
    const std::span<double> exact = scratch.take<double>(items * kPanelColumns);
    std::fill(exact.begin(), exact.end(), 0.0);
    p.exact_sums = exact.data();
    p.sums = column_sums.mutable_data_ptr();
  }
  core::divide(workers, items, [&](int64_t worker, int64_t begin, int64_t end) {
    kernels().outer(p, static_cast<char*>(p.work) + worker * each * bytes, begin, end);
  });
  return {out, column_sums};
}

}  // namespace
}  // namespace deepops

STABLE_TORCH_LIBRARY_IMPL(deepops, CPU, m) {
  m.impl("_lstm_product", TORCH_BOX(&deepops::product_cpu));
  m.impl("_lstm_weight_gradient", TORCH_BOX(&deepops::weight_gradient_cpu));
}
