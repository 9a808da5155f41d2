"""Blocks whose convolution is deepops' own, on NVIDIA GPUs, for ``deepops.functional`` and the layers.

In evaluation the block is one kernel. In training one kernel convolves and leaves the batch statistics of what it
stored; the pass that normalizes is the same that follows torch's convolution. The backward is that of
``batch_norm_act`` and then torch's convolution's: gradients do not depend on the way that the forward went.

``deepops.backends.conv`` and ``deepops._conv_choice`` decide between the two ways.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops import _conv_choice, _conv_problem, backends
from deepops._autograd import BatchNormAct, Grad, what_to_keep
from deepops._autograd import Options as NormalizeOptions
from deepops._batch_norm_act import Settings, after_training, dispatch, name_in_op
from deepops._block import Statistics
from deepops._checks import check_batch_norm, transforms_active
from deepops._conv_problem import PLAIN, Geometry, Problem, Sizes, problem_of, sizes_of
from deepops._convolution import convolution
from deepops._folding import scale_and_shift


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    geometry: Geometry,
    settings: Settings,
    in_group: bool,
) -> Tensor | None:
    """``functional.conv_bn_act`` on the fused way; None where it goes torch's, and nothing has been changed."""
    tensors = (x, conv_weight, conv_bias, residual, weight, bias)
    if settings[0]:
        return _train(*tensors, statistics, geometry, settings, in_group)
    return evaluate(*tensors, statistics, geometry, settings)


def evaluate(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    geometry: Geometry,
    settings: Settings,
    scaled: Callable[[], tuple[Tensor, ...]] | None = None,
    folded: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """``conv_bn_act`` by running statistics, without gradients.

    ``scaled`` gives what ``scale_and_shift`` would; ``folded`` is torch's way where that is one convolution.
    """
    mean, var, _ = statistics
    tensors = (x, conv_weight, conv_bias, residual, weight, bias)
    _, _, eps, activation, negative_slope, approximate, _ = settings
    if not _has_choice() or mean is None or var is None:
        return None
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return None
    call = Call("evaluation" if folded is None else "folded", activation, x, conv_weight, residual, geometry)
    problem = call.problem()
    if problem is None:
        return None

    def fused() -> Tensor:
        vectors = (conv_bias, mean, var, weight, bias)
        scale, shift = scale_and_shift(conv_weight, *vectors, eps) if scaled is None else scaled()
        in_op = name_in_op(activation, approximate)
        data = (problem.x, problem.conv_weight, problem.residual)
        y: Tensor = _conv_problem.ops().conv_bn_act_eval.default(
            *data, scale, shift, *problem.sizes, in_op, negative_slope
        )
        return y

    def aten() -> Tensor:
        z = convolution(x, conv_weight, conv_bias, *geometry)
        return dispatch(z, residual, weight, bias, None, *statistics, settings)

    return fused() if call.is_faster(problem, fused, folded or aten) else None


def _train(
    x: Tensor,
    conv_weight: Tensor,
    shift: Tensor | None,  # [K], the convolution's bias: batch statistics remove it, its gradient is 0
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics,
    geometry: Geometry,
    settings: Settings,
    in_group: bool,
) -> Tensor | None:
    if not _has_choice():
        return None
    call = Call("training", settings[3], x, conv_weight, residual, geometry, in_group)
    problem = call.problem()
    if problem is None or problem.pixels == 1:  # a single value has no variance
        return None
    x, conv_weight, residual, sizes, _ = problem
    mean, var, counter = statistics
    _, momentum, eps, activation, negative_slope, approximate, _ = settings
    like_y = conv_weight.detach().transpose(0, 1)  # has as many channels, its dtype, its device
    check_batch_norm(like_y, mean, var, weight, bias, True, momentum, eps, counter, alone=False)
    if x.dtype is torch.float16 or x.dtype is torch.bfloat16:  # the vectors may be 16-bit too
        weight, bias, mean, var = (None if t is None else t.float() for t in (weight, bias, mean, var))
    options = (True, momentum, eps, name_in_op(activation, approximate), negative_slope)

    def fused(shift: Tensor | None, *statistics: Tensor | None) -> Tensor:
        z, *batch = ConvolutionWithStatistics.apply(x, conv_weight, *statistics, sizes, momentum, eps)  # type: ignore[no-untyped-call]
        y: Tensor = NormalizeAct.apply(z, residual, weight, bias, shift, *batch, options)  # type: ignore[no-untyped-call]
        return y

    def aten() -> Tensor:
        z = convolution(x, conv_weight, None, *geometry)
        return dispatch(z, residual, weight, bias, None, None, None, None, settings)

    nothing = (None, None, None)  # running statistics are not for measurements
    if not call.is_faster(problem, lambda: fused(None, *nothing), aten):
        return None
    y = fused(shift, mean, var, counter)
    after_training(mean, var, counter, shift, momentum)
    for given, wide in zip(statistics[:2], (mean, var), strict=True):
        if given is not None and wide is not None and wide is not given:
            given.copy_(wide)
    return y


def _has_choice() -> bool:
    return not (torch.compiler.is_compiling() or backends.conv == "aten" or transforms_active())


class Call:
    """A call as it comes, and which way it goes."""

    def __init__(
        self,
        mode: str,
        activation: str,
        x: Tensor,
        conv_weight: Tensor,
        residual: Tensor | None,
        geometry: Geometry,
        in_group: bool = False,
    ) -> None:
        """Look at everything that the answer depends on, beside the setting."""
        self.mode, self.smooth = mode, activation in ("silu", "gelu", "hardswish")
        self.arguments = (x, conv_weight, residual, geometry, in_group)
        self.facts: tuple[object, ...] | None = None
        if type(x) not in PLAIN or type(conv_weight) not in PLAIN:
            return  # which may have no memory to ask about
        device = x.device
        self.facts = (
            *(device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16),
            *(conv_weight.dtype, conv_weight.shape, conv_weight.stride()),
            *(tuple(value) if isinstance(value, list) else value for value in geometry),
            *(in_group, mode, self.smooth, None if residual is None else residual.dtype),
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
        )

    def problem(self) -> Problem | None:
        """What ``problem_of`` says; None at once where that, or the choice, is known to lead to torch's way."""
        if self.facts is not None and backends.conv == "auto" and _conv_choice.is_left_to_torch(self.facts):
            return None
        problem = problem_of(*self.arguments)
        if problem is None and self.facts is not None:
            _conv_choice.leave_to_torch(self.facts)
        return problem

    def is_faster(self, problem: Problem, fused: Callable[[], Tensor], aten: Callable[[], Tensor]) -> bool:
        """Whether to go the fused way: because one has to, or because it was measured to be the faster one."""
        if backends.conv == "fused":
            return True
        x, conv_weight, residual, sizes, _ = problem
        what = (x.device, x.dtype, x.shape, conv_weight.shape, _numbers(sizes))
        key = _conv_choice.Key(*what, self.mode, residual is not None, self.smooth)
        if _conv_choice.choose(key, fused, aten) == "fused":
            return True
        _conv_choice.leave_to_torch(self.facts, key)
        return False


def _numbers(sizes: Sizes) -> tuple[int, ...]:
    stride, padding, dilation = sizes
    return *stride, *padding, *dilation


class ConvolutionWithStatistics(torch.autograd.Function):
    """The convolution's result, mean and inverse standard deviation of its channels; keeps its arguments.

    Who uses the statistics takes care of their derivatives: for autograd they are constants.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_weight: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        sizes: Sizes,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, mean, invstd = _conv_problem.ops().conv_bn_act_statistics.default(
            x, conv_weight, running_mean, running_var, num_batches_tracked, *sizes, momentum, eps
        )
        ctx.save_for_backward(x, conv_weight)
        ctx.sizes = sizes
        ctx.mark_non_differentiable(mean, invstd)
        ctx.set_materialize_grads(False)  # of the statistics, two launches
        return z, mean, invstd

    @staticmethod
    def backward(ctx: Any, grad_z: Grad, *_: Grad) -> tuple[Grad, ...]:
        if grad_z is None:
            return (None,) * 8
        x, conv_weight = ctx.saved_tensors
        stride, (top, bottom, left, right), dilation = ctx.sizes
        height, width = x.shape[2:]
        padding = [top, left]
        uneven = top != bottom or left != right
        if uneven:
            x, padding = F.pad(x, [left, right, top, bottom]), [0, 0]
        # Differentiable itself: the backward's backward is torch's too.
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
            grad_z,
            x,
            conv_weight,
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            1,
            [*ctx.needs_input_grad[:2], False],
        )
        if uneven and grad_x is not None:
            grad_x = grad_x[:, :, top : top + height, left : left + width]
        return grad_x, grad_weight, *(None,) * 6


class NormalizeAct(BatchNormAct):
    """``BatchNormAct`` in training where the batch statistics are known already; its backward is the same."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        options: NormalizeOptions,
    ) -> Tensor:
        *_, activation, negative_slope = options
        y: Tensor = torch.ops.deepops.batch_norm_act_eval.default(
            x, residual, weight, bias, mean, invstd, activation, negative_slope
        )
        ctx.save_for_backward(x, what_to_keep(y, residual, activation, negative_slope), weight, bias, mean, invstd)
        ctx.options = options
        ctx.shift_dtype = None if shift is None else shift.dtype
        return y


def explain(conv: Any) -> list[str]:
    """A line for each measured kind of call that ``conv``, a convolution module, makes."""
    if conv.weight.dim() != 4:
        return []
    padding = conv.padding if conv.padding_mode == "zeros" else 0
    numbers = _numbers(sizes_of(conv.weight, conv.stride, padding, conv.dilation))
    mine = (conv.weight.device, conv.weight.shape, numbers)
    lines = _conv_choice.describe(lambda key: (key.device, key.conv_weight, key.geometry) == mine)
    if lines and backends.conv != "auto":
        lines.append(f"but deepops.backends.conv is {backends.conv!r}")
    return lines
