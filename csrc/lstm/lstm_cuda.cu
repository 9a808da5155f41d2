// The LSTM ops on CUDA: checks, registration.
//
// A step is the recurrent product by torch and one pointwise kernel; with a projection its product too and, where h is
// not final then, one more kernel. The loop allocates nothing on the device and reads nothing from it: a graph can
// capture it.
#include "core/gpu.cuh"
// after gpu.cuh
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "lstm/gpu_backward.h"
#include "lstm/gpu_cell.h"
#include "lstm/gpu_forward.h"

namespace deepops::isa_gpu::lstm {
namespace {

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
  check_forward(p, gates_x, c0.scalar_type(), h0, c0, kOp);
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
  STD_TORCH_CHECK(gpu::on_gpu(c0), kOp, ": c0 must be on the GPU");
  check_backward(p, {grad_h, grad_c, grad_h_n, grad_c_n}, gates, c, r, stats, c0, kOp);
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
