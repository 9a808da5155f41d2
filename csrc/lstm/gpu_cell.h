// lstm_pack, lstm_cell, lstm_cell_backward on CUDA: two products and one pointwise kernel, which are those of
// lstm_sequence for a single step.
#pragma once
#include "lstm/gpu_launches.h"
// after gpu.cuh
#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace deepops::isa_gpu::lstm {

// What a call says. packed: weight_ih [4H, I], then weight_hh [4H, H].
struct CellCall {
  LstmShape shape;
  int64_t input;

  CellCall(const Tensor& c, const Tensor& packed, int64_t input_size, const OptionalTensor& peephole,
           std::optional<double> cell_clip, const char* op)
      : shape{}, input(input_size) {
    STD_TORCH_CHECK(gpu::on_gpu(c), op, ": c must be on the GPU");
    STD_TORCH_CHECK(c.dim() == 2 && input >= 0, op, ": c must be [B, H]");
    shape.dtype = core::data_type_of(c, op, "c");
    shape.steps = 1;
    shape.batch = c.size(0);
    shape.hidden = shape.state = c.size(1);
    set_formula(shape, peephole, cell_clip, op);
    check_dense(peephole, {3 * shape.hidden}, c.scalar_type(), c, op, "weight_peephole");
    check_dense(packed, {shape.gates() * (input + shape.hidden)}, c.scalar_type(), c, op, "packed");
    check_size(shape.batch, shape.hidden, op);
  }
  bool empty() const { return shape.batch == 0 || shape.hidden == 0; }
  Tensor weight_ih(const Tensor& packed) const { return view(packed, 0, shape.gates(), input); }
  Tensor weight_hh(const Tensor& packed) const {
    return view(packed, shape.gates() * input, shape.gates(), shape.hidden);
  }
};

inline Tensor pack(Tensor weight_ih, Tensor weight_hh) {
  constexpr const char* kOp = "lstm_pack";
  core::data_type_of(weight_hh, kOp, "weight_hh");
  STD_TORCH_CHECK(gpu::on_gpu(weight_hh), kOp, ": weight_hh must be on the GPU");
  STD_TORCH_CHECK(weight_ih.dim() == 2 && weight_hh.dim() == 2, kOp, ": weights must be [4H, I] and [4H, H]");
  const int64_t hidden = weight_hh.size(1), input = weight_ih.size(1);
  check_dense(weight_hh, {4 * hidden, hidden}, weight_hh.scalar_type(), weight_hh, kOp, "weight_hh");
  check_dense(weight_ih, {4 * hidden, input}, weight_hh.scalar_type(), weight_hh, kOp, "weight_ih");
  const gpu::Device device(weight_hh);
  const Tensor packed = core::empty_vector(4 * hidden * (input + hidden), weight_hh.scalar_type(), weight_hh);
  Tensor first = view(packed, 0, 4 * hidden, input), second = view(packed, 4 * hidden * input, 4 * hidden, hidden);
  torch::stable::copy_(first, weight_ih);
  torch::stable::copy_(second, weight_hh);
  return packed;
}

template <class T>
void cell_step(const LstmShape& p, const Tensor& c, const OptionalTensor& bias, const OptionalTensor& peephole,
               const Tensor& gates, bool save, const Tensor& new_h, const Tensor& new_c, gpu::Stream stream) {
  ForwardStep<T> step{};
  step.formula = p;
  step.place = place_of(p, 0, nullptr);
  step.gates_x = input<T>(bias);
  step.product = input<T>(gates);
  step.c0 = input<T>(c);
  step.peephole = input<T>(peephole);
  step.gates = save ? output<T>(gates) : nullptr;
  step.h = output<T>(new_h);
  step.c = step.c_n = output<T>(new_c);
  step.projects = true;  // h has no further use here
  const bool packs =
      on_packs(p.hidden, sizeof(T), {step.gates_x, step.product, step.c0, step.peephole, step.h, step.c});
  launch_forward(step, packs, false, stream);
}

inline std::tuple<Tensor, Tensor, Tensor> cell(Tensor x, Tensor h, Tensor c, Tensor packed, OptionalTensor bias,
                                               OptionalTensor weight_peephole, std::optional<double> cell_clip,
                                               bool save) {
  constexpr const char* kOp = "lstm_cell";
  STD_TORCH_CHECK(x.dim() == 2, kOp, ": x must be [B, I]");
  const CellCall call(c, packed, x.size(1), weight_peephole, cell_clip, kOp);
  const LstmShape& p = call.shape;
  const gpu::Device device(c);
  x = torch::stable::contiguous(x);
  h = torch::stable::contiguous(h);
  c = torch::stable::contiguous(c);
  check_dense(x, {p.batch, call.input}, c.scalar_type(), c, kOp, "x");
  check_dense(h, {p.batch, p.hidden}, c.scalar_type(), c, kOp, "h");
  check_dense(bias, {p.gates()}, c.scalar_type(), c, kOp, "bias");
  const Tensor new_h = matrix(p.batch, p.hidden, c), new_c = matrix(p.batch, p.hidden, c);
  const Tensor gates = matrix(p.batch, p.gates(), c);
  if (!call.empty()) {
    gpu::multiply(gates, x, transposed(call.weight_ih(packed)));
    gpu::multiply_add(gates, h, transposed(call.weight_hh(packed)));
    DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
      cell_step<T>(p, c, bias, weight_peephole, gates, save, new_h, new_c, device.stream());
    })
  }
  return {new_h, new_c, save ? gates : core::empty_vector(0, c.scalar_type(), c)};
}

template <class T>
void cell_gradients(const LstmShape& p, const OptionalTensor& grad_h, const OptionalTensor& grad_c, const Tensor& gates,
                    const Tensor& c_before, const OptionalTensor& peephole, const Tensor& grad_gates,
                    const Tensor& grad_c_before, const Tensor& grad_peephole, gpu::Stream stream) {
  using A = OpMath<T>;
  const Tensor sums = core::empty_vector(grad_peephole.numel() * p.batch, grad_peephole.scalar_type(), c_before);
  BackwardStep<T> step{};
  step.formula = p;
  step.place = place_of(p, 0, nullptr);
  step.projects = true;  // the gradient of h comes from nowhere else
  step.grad_out = input<T>(grad_h);
  step.grad_c = input<T>(grad_c);
  step.grad_c0 = output<T>(grad_c_before);
  step.gates = input<T>(gates);
  step.c0 = input<T>(c_before);
  step.peephole = input<T>(peephole);
  step.grad_gates = output<T>(grad_gates);
  step.peephole_sums = p.peephole ? output<A>(sums) : nullptr;
  const bool packs = on_packs(p.hidden, sizeof(T),
                              {step.grad_out, step.grad_c, step.grad_c0, step.gates, step.c0, step.peephole,
                               step.grad_gates, step.peephole_sums});
  launch_backward(step, packs, false, stream);
  if (p.peephole) launch_column_sums<T>(input<A>(sums), 3, p, packs, output<A>(grad_peephole), stream);
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cell_backward(OptionalTensor grad_h, OptionalTensor grad_c,
                                                                        Tensor gates, Tensor c_before, Tensor packed,
                                                                        OptionalTensor weight_peephole,
                                                                        std::optional<double> cell_clip,
                                                                        int64_t input_size, bool need_x, bool need_h) {
  constexpr const char* kOp = "lstm_cell_backward";
  const CellCall call(c_before, packed, input_size, weight_peephole, cell_clip, kOp);
  const LstmShape& p = call.shape;
  const gpu::Device device(c_before);
  c_before = torch::stable::contiguous(c_before);
  if (grad_h.has_value()) grad_h = torch::stable::contiguous(*grad_h);
  if (grad_c.has_value()) grad_c = torch::stable::contiguous(*grad_c);
  check_dense(grad_h, {p.batch, p.hidden}, c_before.scalar_type(), c_before, kOp, "grad_h");
  check_dense(grad_c, {p.batch, p.hidden}, c_before.scalar_type(), c_before, kOp, "grad_c");
  check_dense(gates, {p.batch, p.gates()}, c_before.scalar_type(), c_before, kOp, "gates");
  const Tensor grad_gates = matrix(p.batch, p.gates(), c_before), before = matrix(p.batch, p.hidden, c_before);
  const Tensor grad_x = matrix_if(need_x, p.batch, input_size, c_before);
  const Tensor grad_h_before = matrix_if(need_h, p.batch, p.hidden, c_before);
  Tensor grad_peephole = core::empty_vector(p.peephole ? 3 * p.hidden : 0, core::opmath_scalar_type(p.dtype), c_before);
  if (call.empty()) {
    torch::stable::zero_(grad_peephole);
  } else {
    DEEPOPS_DISPATCH_DTYPE(p.dtype, [&]<class T>() {
      cell_gradients<T>(p, grad_h, grad_c, gates, c_before, weight_peephole, grad_gates, before, grad_peephole,
                        device.stream());
    })
    if (need_x && input_size > 0) gpu::multiply(grad_x, grad_gates, call.weight_ih(packed));
    if (need_h) gpu::multiply(grad_h_before, grad_gates, call.weight_hh(packed));
  }
  return {grad_gates, grad_x, grad_h_before, before, grad_peephole};
}

}  // namespace deepops::isa_gpu::lstm
