"""Convolution, batch normalization and activation as one op in training: the Function that such ops share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepops._autograd import Grad, aliases, differentiate, grads_of_arguments, memory_format_of
from deepops._checks import Size

Statistics = tuple[Tensor | None, Tensor | None, Tensor | None]  # running mean and variance, counter
SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def rounded_as(x: Tensor, conv_weight: Tensor) -> Tensor:
    """``conv_weight`` as an op takes it: beside 16-bit ``x`` rounded to its dtype, as autocast does, and in fp32."""
    return conv_weight.to(x.dtype).float() if x.dtype in SIXTEEN_BIT else conv_weight


class ConvBatchNormAct(torch.autograd.Function):
    """``act(batch_norm(conv2d(x, conv_weight)))``. A class derived from it is one op: its calls, with its ``options``.

    Options are what ``covers`` says that the op is told of a convolution, then momentum, eps, activation and negative
    slope.
    """

    @staticmethod
    def covers(
        x: Tensor,
        conv_weight: Tensor,
        stride: Size,
        padding: Size | str,
        dilation: Size,
        groups: int,
        activation: str,
    ) -> tuple[Tensor, tuple[Any, ...]] | None:
        """Whether the op takes such a call, for arguments that ``conv_bn_act`` has checked; None where it does not.

        Else a tensor that has as many channels (dimension 1) as the output, its dtype and device, for the per-channel
        vectors to be checked against; and what the options begin with.
        """
        raise NotImplementedError

    @staticmethod
    def train(
        x: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics,
        options: Any,
        save: bool,
    ) -> Sequence[Tensor]:
        """The output, the mean, what the backward needs beside; with ``save`` False only the output matters."""
        raise NotImplementedError

    @staticmethod
    def gradients(
        grad_y: Tensor, saved: Sequence[Any], options: Any, needed: tuple[bool, bool, bool]
    ) -> Sequence[Grad]:
        """Those of ``x``, ``conv_weight``, ``weight`` and ``bias``.

        ``saved``: these four and what ``train`` gave after its output. ``needed``: the first, the second, the others.
        """
        raise NotImplementedError

    @staticmethod
    def plain(x: Tensor, conv_weight: Tensor, weight: Tensor | None, bias: Tensor | None, options: Any) -> Tensor:
        """The output, by differentiable torch operations."""
        raise NotImplementedError

    @classmethod
    def run(
        cls,
        x: Tensor,  # [N, C, H, W], channels_last or contiguous
        conv_weight: Tensor,  # [K, C / groups, R, S]
        shift: Tensor | None,  # [K], the convolution's bias: batch statistics remove it, its gradient is 0
        weight: Tensor | None,  # [K], as the following
        bias: Tensor | None,
        statistics: Statistics,
        options: Any,
    ) -> Tensor:
        """Call the op, recorded for autograd where a gradient is wanted. Nothing is checked here."""
        if not (conv_weight.is_contiguous() or conv_weight.is_contiguous(memory_format=torch.channels_last)):
            conv_weight = conv_weight.contiguous()
        tensors = (x, conv_weight, weight, bias, shift)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            # Function.apply first asks whether torch.func is at work. fit, without which nobody comes here, has asked.
            apply: Callable[..., Tensor] = super(torch.autograd.Function, cls).apply  # type: ignore[misc]
            return apply(*tensors, *statistics, cls, options)
        return cls.train(x, conv_weight, weight, bias, statistics, options, False)[0]

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_weight: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shift: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        op: type[ConvBatchNormAct],
        options: Any,
    ) -> Tensor:
        statistics = (running_mean, running_var, num_batches_tracked)
        y, *kept = op.train(x, conv_weight, weight, bias, statistics, options, True)
        ctx.save_for_backward(x, conv_weight, weight, bias, *kept)
        ctx.op, ctx.options = op, options
        ctx.shift_dtype = None if shift is None else shift.dtype
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Grad, ...]:
        saved = ctx.saved_tensors  # once: checkpointing computes them when asked
        need_x, need_conv_weight, need_weight, need_bias, *_ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # double backward
            x, conv_weight, weight, bias, *_ = aliases(saved)
            y = ctx.op.plain(x, conv_weight, weight, bias, ctx.options)
            grads: Sequence[Grad] = differentiate(ctx, y, [x, conv_weight, weight, bias], grad_y)
        else:
            grad_y = grad_y.contiguous(memory_format=memory_format_of(saved[0]))
            needed = (need_x, need_conv_weight, need_weight or need_bias)
            grads = ctx.op.gradients(grad_y, saved, ctx.options, needed)
        return grads_of_arguments(ctx, grads, saved[4])
