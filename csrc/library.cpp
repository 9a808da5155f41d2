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
  // fp64; z, the convolution's result, is computed again wherever it is needed. mean and invstd are those of z. stride,
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
