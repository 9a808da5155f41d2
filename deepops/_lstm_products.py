"""The large products around the LSTM's ops, over all steps at once: of the inputs, and of what the backward gives."""

from __future__ import annotations

import torch
from torch import Tensor

from deepops._library import has_kernel
from deepops._lstm_types import Weights

_KERNEL = has_kernel("_lstm_product", "cpu")
_SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the large products: that of the data, but float32 for 16-bit data on the CPU, as the op takes them."""
    return torch.float32 if x.dtype in _SIXTEEN_BIT and x.device.type == "cpu" else x.dtype


def input_gates(x: Tensor, weights: Weights, eps: float) -> tuple[Tensor, list[Tensor | None]]:
    """``x W_ih^T`` with layer norm and biases, [T, B, 4H], and what the backward needs of the layer norm."""
    dtype = product_dtype(x)
    rows, weight = x.reshape(-1, x.size(2)).to(dtype), weights.weight_ih.to(dtype)
    biases = [bias.to(dtype) for bias in (weights.bias_ih, weights.bias_hh) if bias is not None]
    bias = sum(biases[1:], biases[0]) if biases else None
    shape = (x.size(0), x.size(1), weight.size(0))
    if weights.weight_ln_ih is None:
        return product(rows, weight, bias, transposed=True).view(shape), [None] * 3
    a = product(rows, weight, transposed=True).to(x.dtype)  # rounded, as it is kept
    scale = weights.weight_ln_ih.to(dtype)
    gates, mean, invstd = torch.native_layer_norm(a.to(dtype), [weight.size(0)], scale, bias, eps)
    return gates.view(shape), [a, mean, invstd]


def ours_is_faster(rows: Tensor, columns: int) -> bool:
    """Whether a product of so many rows, with a result of so many columns, is for our kernel.

    It takes 64 columns at a time: where more than a sixth of them would be filled up with zeros MKL is faster, and for
    few rows, for which the weights need not be packed. Otherwise it takes 0.6 to 0.95 of MKL's time.
    """
    if not _KERNEL or not rows.is_cpu or rows.dtype not in (torch.float32, torch.float64):
        return False
    return not torch.compiler.is_compiling() and rows.size(0) >= 64 and -columns % 64 * 6 <= columns


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """``rows weight + bias``, or ``rows weight^T + bias``: [M, K] and [K, N], or [N, K], to [M, N]."""
    if ours_is_faster(rows, weight.size(0 if transposed else 1)):
        y: Tensor = torch.ops.deepops._lstm_product.default(rows.contiguous(), weight.contiguous(), bias, transposed)
        return y
    weight = weight.t() if transposed else weight
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def recurrent_weight_grad(
    grad_r: Tensor,  # [T, B, 4H]
    h: Tensor,  # [T, B, R]
    h0: Tensor,  # [B, R]
    hidden_mask: Tensor | None,  # [B, R]
    lengths: Tensor | None,  # [B]
    reverse: bool,
) -> Tensor:
    """``sum_t grad_r_t^T h_before_t``, h of the step before: all steps but each sequence's first, and ``h0`` there.

    Rows beyond a sequence's end are 0 in ``grad_r`` and in ``h``, so that they may take part.
    """
    if hidden_mask is not None:
        h, h0 = h * hidden_mask, h0 * hidden_mask
    rows = grad_r.flatten(0, 1)
    if ours_is_faster(rows, h.size(2)) and not (reverse and lengths is not None):
        others = (h[1:] if reverse else h[:-1]).flatten(0, 1).to(grad_r.dtype)
        grad: Tensor = torch.ops.deepops._lstm_weight_gradient.default(
            rows.contiguous(), others.contiguous(), h0.to(grad_r.dtype).contiguous(), reverse, False
        )[0]
        return grad
    if not reverse:
        first, later, before = grad_r[0], grad_r[1:], h[:-1]
    else:
        later, before = grad_r[:-1], h[1:]
        if lengths is None:
            first = grad_r[-1]
        else:  # a sequence begins at its last step
            at = (lengths - 1).clamp(0, grad_r.size(0) - 1)
            first = grad_r.gather(0, at[None, :, None].expand(1, -1, grad_r.size(2)))[0]
    grad = over_rows(first, h0.to(grad_r.dtype))
    if later.size(0) == 0:
        return grad
    return grad.add_(over_rows(later.flatten(0, 1), before.flatten(0, 1).to(grad_r.dtype)))


def over_rows(a: Tensor, b: Tensor) -> Tensor:
    """``a^T b`` of many rows, contiguous.

    With up to 8 columns of ``b`` MKL adds up all rows in one chain: the transposed product is 4 to 10 times closer to
    the exact one (2,000 and 32,000 rows).
    """
    return over_rows_with_sums(a, b, False)[0]


def over_rows_with_sums(a: Tensor, b: Tensor, sums: bool = True) -> tuple[Tensor, Tensor]:
    """``over_rows`` and, with ``sums``, ``a`` summed over its rows too."""
    if ours_is_faster(a, b.size(1)):
        both: tuple[Tensor, Tensor] = torch.ops.deepops._lstm_weight_gradient.default(
            a.contiguous(), b.contiguous(), None, False, sums
        )
        return both
    grad = a.t() @ b if b.size(1) > 8 or a.size(1) <= 8 else (b.t() @ a).t().contiguous()
    return grad, a.sum(0) if sums else a[0, :0]
