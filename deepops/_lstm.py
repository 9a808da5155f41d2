"""One layer of an LSTM in one direction, under autograd: the compiled op, the large products around it, its backward.

The op takes the product of the inputs and ``weight_ih`` for all steps at once and does what comes after it, step by
step. Its backward gives the gradients of the gates, of all steps too; what is left, the gradients of the weights and of
the inputs, is a handful of large products, by PyTorch. ``deepops/reference/lstm.py`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepops._autograd import Grad, aliases
from deepops._checks import autocast_enabled, transforms_active
from deepops._fallback import warn_once
from deepops._library import gpu_not_covered, has_kernel
from deepops._lstm_products import (
    input_gates,
    over_rows,
    over_rows_with_sums,
    product,
    product_dtype,
    recurrent_weight_grad,
)
from deepops._lstm_types import PLAIN, Variant, Weights
from deepops.reference import lstm as reference

# reverse, cell_clip, layer_norm_eps, zoneout_h, zoneout_c, recurrent_dropout, first_step: as the ops take them.
Settings = tuple[bool, float | None, float, float, float, float, int]
# h and c of every step, h and c of the last one.
States = tuple[Tensor, Tensor, Tensor, Tensor]

# Looked up once: a dictionary is something torch.compile can trace.
_KERNEL_ON = {
    device: has_kernel("lstm_sequence", device) and has_kernel("lstm_sequence_backward", device)
    for device in ("cpu", "cuda")
}
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def runs_on_kernel(x: Tensor) -> bool:
    """Whether the ops take data like ``x``: on a device that has them, not empty, not seen by ``torch.func``."""
    device = x.device.type
    if not _KERNEL_ON.get(device, False) or x.dtype not in _DTYPES:
        return False
    if torch.compiler.is_compiling():
        return True
    if device == "cuda" and gpu_not_covered(x.device.index):
        return False
    return x.numel() > 0 and not transforms_active()


def choice(x: Tensor, plain: bool, recorded: bool = False) -> str:
    """What computes an LSTM: "kernel" is ours, "torch" its own, "reference" ours in plain PyTorch.

    Args:
        x: the input.
        plain: it is one that torch has, without variants, ``lengths`` or states of all steps.
        recorded: torch's operations are being recorded, for use without deepops.
    """
    if not recorded and runs_on_kernel(x):
        return "kernel"
    if plain and (recorded or not transforms_active()):
        return "torch"
    device = x.device.type
    if not (recorded or torch.compiler.is_compiling() or _KERNEL_ON.get(device)):
        warn_once(device)
    return "reference"


def lstm_layer(
    x: Tensor,  # [T, B, I]
    h0: Tensor,  # [B, R]
    c0: Tensor,  # [B, H]
    weights: Weights,
    variant: Variant = PLAIN,
    *,
    reverse: bool = False,
    lengths: Tensor | None = None,  # [B], int64, on the device of x
    seed: Tensor | None = None,  # [1], int64; None in evaluation
    first_step: int = 0,
    kernel: bool = True,  # what runs_on_kernel says
) -> States:
    """``(h, c, h_n, c_n)``: the states of every step, ``[T, B, R]`` and ``[T, B, H]``, and the last ones.

    All floating tensors have one dtype; nothing is checked here. ``h`` and ``c`` are 0 after a sequence's end.
    """
    hidden_mask = None
    if seed is not None and variant.input_dropout > 0:
        x = x * _sequence_mask(seed, reference.INPUT_MASK, x[0], variant.input_dropout)
    if seed is not None and variant.hidden_dropout > 0:
        hidden_mask = _sequence_mask(seed, reference.HIDDEN_MASK, h0, variant.hidden_dropout)
    settings = (
        reverse,
        variant.cell_clip,
        variant.layer_norm_eps,
        variant.zoneout_h,
        variant.zoneout_c,
        variant.recurrent_dropout,
        first_step,
    )
    with no_autocast(x):
        if not kernel:
            return _plain(x, h0, c0, weights, hidden_mask, lengths, seed, settings)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, h0, c0, *weights)):
            states: States = LSTMLayer.apply(x, h0, c0, *weights, hidden_mask, lengths, seed, settings)  # type: ignore[no-untyped-call]
            return states
        return _forward(x, h0, c0, weights, hidden_mask, lengths, seed, settings, save=False)[0]


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """The caller has brought all tensors to one dtype: autocast must not change it again, product by product."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocasts(x: Tensor) -> bool:
    """``autocast_enabled``, in a tenth of its time where no autocast is on."""
    return (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()) and autocast_enabled(x)


def _sequence_mask(seed: Tensor, stream: int, like: Tensor, p: float) -> Tensor:
    """0 with probability ``p``, else ``1 / (1 - p)``, for each element of ``like``, [B, N]; the same for all steps."""
    kept = ~reference.random_mask(seed, stream, 0, like.size(0), like.size(1), p)
    return kept.to(like.dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _plain(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Weights,
    hidden_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
) -> States:
    """The layer in plain PyTorch, differentiable as often as one likes."""
    reverse, cell_clip, eps, zoneout_h, zoneout_c, recurrent_dropout, first_step = settings
    gates_x = F.linear(x, weights.weight_ih)
    if weights.weight_ln_ih is not None:
        gates_x = F.layer_norm(gates_x, (gates_x.size(2),), weights.weight_ln_ih, None, eps)
    if weights.bias_ih is not None:
        gates_x = gates_x + weights.bias_ih
    if weights.bias_hh is not None:
        gates_x = gates_x + weights.bias_hh
    return reference.lstm_sequence(
        gates_x,
        h0,
        c0,
        weights.weight_hh,
        weights.weight_hr,
        weights.weight_peephole,
        weights.weight_ln_hh,
        weights.weight_ln_c,
        weights.bias_ln_c,
        hidden_mask,
        lengths,
        seed,
        reverse=reverse,
        cell_clip=cell_clip,
        layer_norm_eps=eps,
        zoneout_h=zoneout_h,
        zoneout_c=zoneout_c,
        recurrent_dropout=recurrent_dropout,
        first_step=first_step,
    )


def _forward(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Weights,
    hidden_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
    save: bool,
) -> tuple[States, list[Tensor | None]]:
    """The states and, with ``save``, what the backward needs beside them."""
    gates_x, kept = input_gates(x, weights, settings[2])
    h, c, h_n, c_n, *saved = torch.ops.deepops.lstm_sequence.default(
        gates_x,
        h0.contiguous(),
        c0.contiguous(),
        weights.weight_hh.contiguous(),
        *(None if weight is None else weight.contiguous() for weight in weights[4:6]),
        *(None if weight is None else weight.contiguous() for weight in weights[7:]),
        hidden_mask,
        lengths,
        seed,
        *settings,
        save,
        True,
    )
    return (h, c, h_n, c_n), saved + kept


class LSTMLayer(torch.autograd.Function):
    """The layer on the compiled ops; keeps input, weights, gates, cell states and outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, *arguments: Any) -> States:
        weights = Weights(*arguments[:10])
        mask, lengths, seed, settings = arguments[10:]
        states, kept = _forward(x, h0, c0, weights, mask, lengths, seed, settings, save=True)
        ctx.save_for_backward(x, h0, c0, *weights, mask, lengths, seed, states[0], states[1], *kept)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    def backward(ctx: Any, grad_h: Grad, grad_c: Grad, grad_h_n: Grad, grad_c_n: Grad) -> tuple[Grad, ...]:
        grads_of_states = (grad_h, grad_c, grad_h_n, grad_c_n)
        saved = ctx.saved_tensors  # once: under checkpointing it computes them
        differentiable = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        with no_autocast(saved[0]):
            grads = (_differentiable_backward if differentiable else _backward)(ctx, saved, grads_of_states)
        return (*grads, *(None,) * 4)  # mask, lengths, seed, settings


def _backward(ctx: Any, saved: Sequence[Any], grads_of_states: Sequence[Grad]) -> list[Grad]:
    """Gradients of input, states and weights, in the order of the Function's arguments."""
    x, h0, c0, *rest = saved
    weights, (hidden_mask, lengths, seed, h, c), kept = Weights(*rest[:10]), rest[10:15], rest[15:]
    gates, out, r, stats, a, mean, invstd = kept
    found = torch.ops.deepops.lstm_sequence_backward.default(
        *(None if grad is None else grad.contiguous() for grad in grads_of_states),
        gates,
        c,
        r,
        stats,
        c0.contiguous(),
        weights.weight_hh.contiguous(),
        *(None if weight is None else weight.contiguous() for weight in weights[4:6]),
        *(None if weight is None else weight.contiguous() for weight in weights[7:]),
        hidden_mask,
        lengths,
        seed,
        *ctx.settings,
    )
    grad_gates, grad_r, grad_out, grad_h0, grad_c0, *grads_of_vectors = found
    dtype, needs = product_dtype(x), dict(zip(("x", "h0", "c0", *Weights._fields), ctx.needs_input_grad, strict=False))
    grads: dict[str, Grad] = {"h0": grad_h0, "c0": grad_c0}
    grads.update(zip(("weight_peephole", "weight_ln_hh", "weight_ln_c", "bias_ln_c"), grads_of_vectors, strict=True))
    rows = grad_gates.flatten(0, 1).to(dtype)
    biased = needs["bias_ih"] or needs["bias_hh"]
    together = biased and needs["weight_ih"] and weights.weight_ln_ih is None  # sums with the weight's product
    if biased and not together:
        grads["bias_ih"] = grads["bias_hh"] = rows.sum(0)
    if needs["weight_hh"]:
        of_r = grad_gates if weights.weight_ln_hh is None else grad_r
        grads["weight_hh"] = recurrent_weight_grad(of_r.to(dtype), h, h0, hidden_mask, lengths, ctx.settings[0])
    if needs["weight_hr"]:
        grads["weight_hr"] = over_rows(grad_out.flatten(0, 1).to(dtype), out.flatten(0, 1).to(dtype))
    if weights.weight_ln_ih is not None:
        wanted = [needs["x"] or needs["weight_ih"], needs["weight_ln_ih"], False]
        scale = weights.weight_ln_ih.to(dtype)
        rows, grads["weight_ln_ih"], _ = torch.ops.aten.native_layer_norm_backward.default(
            rows, a.to(dtype), [rows.size(1)], mean, invstd, scale, None, wanted
        )
    if needs["weight_ih"]:
        inputs = x.reshape(-1, x.size(2)).to(dtype)
        grads["weight_ih"], sums = over_rows_with_sums(rows, inputs, together)
        if together:
            grads["bias_ih"] = grads["bias_hh"] = sums
    if needs["x"]:
        grads["x"] = product(rows, weights.weight_ih.to(dtype)).view_as(x)
    return [grads[name].to(x.dtype) if needed else None for name, needed in needs.items()]  # type: ignore[union-attr]


def _differentiable_backward(ctx: Any, saved: Sequence[Any], grads_of_states: Sequence[Grad]) -> list[Grad]:
    """The same gradients by differentiable torch operations, for double backward (``create_graph=True``)."""
    mask, lengths, seed = saved[13:16]
    inputs = aliases(saved[:13])
    x, h0, c0, *weights = inputs
    states = _plain(x, h0, c0, Weights(*weights), mask, lengths, seed, ctx.settings)
    pairs = [(state, grad) for state, grad in zip(states, grads_of_states, strict=True) if grad is not None]
    grads: list[Grad] = [None] * len(inputs)
    if not pairs:
        return grads
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[: len(inputs)]) if needed]
    outputs, grads_of_outputs = zip(*pairs, strict=True)
    found = torch.autograd.grad(
        outputs, [inputs[i] for i in wanted], grads_of_outputs, create_graph=True, materialize_grads=True
    )
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return grads
