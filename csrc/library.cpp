// Every op schema of deepops, on one screen. Implementations register themselves from csrc/<op>/.
//
// Conventions: tensors first, then hyper-parameters; `Tensor(a!)` is updated in place; an output that was not asked for
// is returned as an empty tensor. Ops know nothing of autograd or autocast: deepops/functional.py and deepops/optim/
// do.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(deepops, m) {
  // act(batch_norm(x) + residual) with batch statistics; also returns them as (mean, invstd) for the backward.
  // momentum=None: cumulative average over num_batches_tracked, as torch.nn.BatchNorm2d(momentum=None).
  m.def(
      "batch_norm_act_train(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, "
      "float negative_slope) -> (Tensor y, Tensor mean, Tensor invstd)");
  // The same with given (running) statistics.
  m.def(
      "batch_norm_act_eval(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, "
      "str activation, float negative_slope) -> Tensor y");
  // kept: what the activation's derivative needs beside x when there was a residual (the output for the ReLU family,
  // else the residual). training: mean and invstd are functions of x. need_*: which gradients are wanted.
  m.def(
      "batch_norm_act_backward(Tensor grad_y, Tensor x, Tensor? kept, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, bool training, str activation, float negative_slope, bool need_x, bool need_residual, bool "
      "need_affine) -> "
      "(Tensor grad_x, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)");
  // batch_norm_act_train where several processes share a batch, in three ops: what is between them is collective. A
  // part's statistics, float64: the means, the biased variances, and how many values a channel has, [2 * C + 1].
  m.def("batch_norm_act_statistics(Tensor x) -> Tensor part");
  // gathered: those of all processes, [processes, 2 * C + 1]. Also updates the running statistics; count: of the values
  // of a channel in all processes, [1], float64. Then batch_norm_act_eval. x: for its dtype and device alone.
  m.def(
      "batch_norm_act_merge(Tensor x, Tensor gathered, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, float? momentum, float eps) -> (Tensor mean, Tensor invstd, Tensor count)");
  // Its backward, in two. sums: of g and of g * (x - mean), [2 * C], float64, g = grad_y * act'.
  m.def(
      "batch_norm_act_reduce(Tensor grad_y, Tensor x, Tensor? kept, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, str activation, float negative_slope, bool need_affine) -> "
      "(Tensor sums, Tensor grad_weight, Tensor grad_bias)");
  // sums: added up over the processes.
  m.def(
      "batch_norm_act_input_grad(Tensor grad_y, Tensor x, Tensor? kept, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor invstd, Tensor sums, Tensor count, str activation, float negative_slope, bool need_residual) -> "
      "(Tensor grad_x, Tensor grad_residual)");
  // act(batch_norm(conv2d(x, conv_weight, groups=C))) with batch statistics, channels_last, C of 16 or more, fp32 or
  // fp64, on the CPU also fp16 and bf16 (conv_weight and vectors are then fp32) and contiguous fp32 and fp64 data; z,
  // the convolution's result, is computed again wherever it is needed. mean and invstd are those of z. stride,
  // dilation: y, x. padding: top, bottom, left, right.
  m.def(
      "depthwise_bn_act_train(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, int[2] stride, int[4] padding, int[2] dilation, "
      "float? momentum, float eps, str activation, float negative_slope) -> (Tensor y, Tensor mean, Tensor invstd)");
  m.def(
      "depthwise_bn_act_backward(Tensor grad_y, Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor invstd, int[2] stride, int[4] padding, int[2] dilation, str activation, "
      "float negative_slope, bool need_x, bool need_conv_weight, bool need_affine) -> "
      "(Tensor grad_x, Tensor grad_conv_weight, Tensor grad_weight, Tensor grad_bias)");
  // act(conv2d(x, conv_weight, bias, groups=C)): evaluation, with batch norm folded into conv_weight and bias, [C]. The
  // CPU's alone: on a GPU it is ATen's convolution and an activation.
  m.def(
      "depthwise_bn_act_eval(Tensor x, Tensor conv_weight, Tensor bias, int[2] stride, int[4] padding, "
      "int[2] dilation, str activation, float negative_slope) -> Tensor y");
  // What follows the product of inputs and W_ih, for a whole sequence; deepops/reference/lstm.py has the formulas.
  // gates_x: x W_ih^T + b_ih + b_hh, [T, B, 4H], float for 16-bit data on the CPU. seed: of the random masks; None in
  // evaluation. first_step: the number of step 0. save: also return what the backward needs: activated gates (i, f, g
  // before dropout, o), c of every step, o * tanh(.) before a projection, r = h W_hh^T before layer norm, and its mean
  // and invstd and those of the cell, [T, B, 4].
  m.def(
      "lstm_sequence(Tensor gates_x, Tensor h0, Tensor c0, Tensor weight_hh, Tensor? weight_hr, "
      "Tensor? weight_peephole, Tensor? weight_ln_hh, Tensor? weight_ln_c, Tensor? bias_ln_c, Tensor? hidden_mask, "
      "Tensor? lengths, Tensor? seed, bool reverse, float? cell_clip, float layer_norm_eps, float zoneout_h, "
      "float zoneout_c, float recurrent_dropout, int first_step, bool save, bool all_c) -> "
      "(Tensor h, Tensor c, Tensor h_n, Tensor c_n, Tensor gates, Tensor out, Tensor r, Tensor stats)");
  // Its backward. grad_gates: of gates_x. grad_r: of r (layer norm; else empty: it is grad_gates). grad_out: of what
  // weight_hr gave, [T, B, P]. All three in the type of gates_x.
  m.def(
      "lstm_sequence_backward(Tensor? grad_h, Tensor? grad_c, Tensor? grad_h_n, Tensor? grad_c_n, Tensor gates, "
      "Tensor c, Tensor r, Tensor stats, Tensor c0, Tensor weight_hh, Tensor? weight_hr, Tensor? weight_peephole, "
      "Tensor? weight_ln_hh, Tensor? weight_ln_c, Tensor? bias_ln_c, Tensor? hidden_mask, Tensor? lengths, "
      "Tensor? seed, bool reverse, float? cell_clip, float layer_norm_eps, float zoneout_h, float zoneout_c, "
      "float recurrent_dropout, int first_step) -> "
      "(Tensor grad_gates, Tensor grad_r, Tensor grad_out, Tensor grad_h0, Tensor grad_c0, "
      "Tensor grad_weight_peephole, Tensor grad_weight_ln_hh, Tensor grad_weight_ln_c, Tensor grad_bias_ln_c)");
  // The large products around it on the CPU, float32 or float64: a [M, K] times weight [K, N], or [N, K] if transposed,
  // plus bias; and grad^T x, the sum over all steps' rows, with the sums of grad's columns if wanted. Rows of `start`
  // come before those of x, or after them.
  m.def("_lstm_product(Tensor a, Tensor weight, Tensor? bias, bool transposed) -> Tensor");
  m.def(
      "_lstm_weight_gradient(Tensor grad, Tensor x, Tensor? start, bool start_last, bool sums) -> "
      "(Tensor, Tensor sums)");
  // Both weights of a cell in the order in which lstm_cell reads them; device dependent, opaque. Weights [4H, I],
  // [4H, H].
  m.def("lstm_pack(Tensor weight_ih, Tensor weight_hh) -> Tensor packed");
  // One step of a plain cell (also with peepholes and clipping). bias: b_ih + b_hh, [4H], in the type of sums on the
  // CPU, of the data on CUDA. save: also return the activated gates, [B, 4H].
  m.def(
      "lstm_cell(Tensor x, Tensor h, Tensor c, Tensor packed, Tensor? bias, Tensor? weight_peephole, float? cell_clip, "
      "bool save) -> (Tensor h, Tensor c, Tensor gates)");
  // grad_gates: [B, 4H]. The gradients of weights and biases are products and sums of it, over all steps at once.
  m.def(
      "lstm_cell_backward(Tensor? grad_h, Tensor? grad_c, Tensor gates, Tensor c_before, Tensor packed, "
      "Tensor? weight_peephole, float? cell_clip, int input_size, bool need_x, bool need_h) -> "
      "(Tensor grad_gates, Tensor grad_x, Tensor grad_h, Tensor grad_c, Tensor grad_weight_peephole)");
  // act(batch_norm(conv2d(x, conv_weight))) of a 1x1 convolution with batch statistics, channels_last, fp32 or fp64, on
  // the CPU; z, the convolution's result, is never stored. mean and invstd are those of z. moments: means of x and its
  // covariances, [(1 + C) * C]. bits: on which side of its kink the activation was, for relu, leaky_relu and relu6;
  // with `save` alone. The CPU's alone: on a GPU the products would be cuBLAS' and z would have to be stored for them.
  m.def(
      "pointwise_bn_act_train(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str activation, "
      "float negative_slope, bool save) -> (Tensor y, Tensor mean, Tensor invstd, Tensor moments, Tensor bits)");
  m.def(
      "pointwise_bn_act_backward(Tensor grad_y, Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, "
      "Tensor mean, Tensor invstd, Tensor moments, Tensor bits, str activation, float negative_slope, bool need_x, "
      "bool need_conv_weight, bool need_affine) -> "
      "(Tensor grad_x, Tensor grad_conv_weight, Tensor grad_weight, Tensor grad_bias)");
  // act(conv2d(x, conv_weight, bias, stride) + residual) of a 1x1 convolution: evaluation, with batch norm folded into
  // conv_weight and bias. fp32 or fp64, channels_last or contiguous, on the CPU, as above. packed: conv_weight in the
  // order in which channels_last data is multiplied with it; None: it is packed in the call.
  m.def("pointwise_bn_act_pack(Tensor conv_weight) -> Tensor packed");
  m.def(
      "pointwise_bn_act_eval(Tensor x, Tensor conv_weight, Tensor? packed, Tensor bias, Tensor? residual, "
      "int[2] stride, str activation, float negative_slope) -> Tensor y");
  // act(conv2d(x, conv_weight) * scale + shift + residual) in one kernel, on NVIDIA GPUs. x, conv_weight [K, C, R, S],
  // residual and y: channels_last. scale, shift: [K], float32. fp16 and bf16 with C a multiple of 8: on tensor cores;
  // fp32, fp16, bf16 with C up to 4, first layers: without. stride, dilation: y, x. padding: top, bottom, left, right.
  // The GPU's alone: on the CPU the convolution is oneDNN's.
  m.def(
      "conv_bn_act_eval(Tensor x, Tensor conv_weight, Tensor? residual, Tensor scale, Tensor shift, int[2] stride, "
      "int[4] padding, int[2] dilation, str activation, float negative_slope) -> Tensor y");
  // z = conv2d(x, conv_weight) in the dtype of x, and the batch statistics of what is stored in z; updates the running
  // statistics as batch_norm_act_train does. batch_norm_act_eval(z, ..., mean, invstd) is the rest of the forward.
  m.def(
      "conv_bn_act_statistics(Tensor x, Tensor conv_weight, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, int[2] stride, int[4] padding, int[2] dilation, float? momentum, float eps) -> "
      "(Tensor z, Tensor mean, Tensor invstd)");
  // One torch.optim.Adam step of every tensor; state_steps (fp32, 0-dim) are advanced first. max_exp_avg_sqs is empty
  // without amsgrad. decoupled_weight_decay: AdamW's decay instead of L2.
  m.def(
      "adam(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, *, float lr, float beta1, float beta2, "
      "float weight_decay, float eps, bool amsgrad, bool maximize, bool decoupled_weight_decay) -> ()");
  // One torch.optim.SGD step. momentum_buffers is empty without momentum; a counter of 0 says that a buffer has nothing
  // yet.
  m.def(
      "sgd(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor(c!)[] state_steps, *, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
  // One torch.optim.RMSprop step. grad_avgs is empty unless centered, momentum_buffers without momentum.
  m.def(
      "rmsprop(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] grad_avgs, "
      "Tensor(d!)[] momentum_buffers, Tensor(e!)[] state_steps, *, float lr, float alpha, float eps, "
      "float weight_decay, float momentum, bool centered, bool maximize) -> ()");
}
