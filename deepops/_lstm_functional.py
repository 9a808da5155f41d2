"""``deepops.functional.lstm`` and ``lstm_cell``: one layer in one direction, and one step of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from deepops._checks import check_data
from deepops._lstm import States, lstm_layer, runs_on_kernel
from deepops._lstm_checks import (
    Pair,
    Seed,
    as_pair,
    as_variant,
    check_states,
    check_weights,
    checked_lengths,
    checked_seed,
)
from deepops._lstm_types import Weights


def lstm(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_hr: Tensor | None = None,
    *,
    training: bool = False,
    reverse: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    weight_peephole: Tensor | None = None,
    weight_ln_ih: Tensor | None = None,
    weight_ln_hh: Tensor | None = None,
    weight_ln_c: Tensor | None = None,
    bias_ln_c: Tensor | None = None,
    layer_norm_eps: float = 1e-5,
    zoneout: Pair = 0.0,
    variational_dropout: Pair = 0.0,
    recurrent_dropout: float = 0.0,
    cell_clip: float | None = None,
    seed: Seed = None,
    first_step: int = 0,
) -> States:
    """One layer of an LSTM in one direction; :class:`deepops.nn.LSTM` has the formulas and their sources.

    Args:
        x: ``[T, B, I]``, fp32, fp64, fp16 or bf16.
        hx: ``(h_0, c_0)``, ``[B, R]`` and ``[B, H]``, R = P with ``weight_hr``, else H; None for zeros.
        weight_ih, weight_hh: ``[4H, I]``, ``[4H, R]``, rows in torch's order i, f, g, o. All tensors have the dtype of
            ``x``; under autocast too, which does not reach into this function.
        bias_ih, bias_hh: ``[4H]`` or None for zeros.
        weight_hr: projection ``[P, H]`` or None.
        training: take random masks; else zoneout takes expectations and nothing is dropped (default False).
        reverse: go from the last step to the first (False).
        lengths: steps of each sequence, ``[B]``, int64, 0 to T; None for T.
        weight_peephole: ``[3H]``, of i, f, o, or None.
        weight_ln_ih, weight_ln_hh, weight_ln_c, bias_ln_c: layer norm, ``[4H]`` twice, ``[H]`` twice; all or none.
        layer_norm_eps, zoneout, variational_dropout, recurrent_dropout, cell_clip: as of :class:`deepops.nn.LSTM`.
        seed: of the masks; None draws one from torch's generator.
        first_step: the number of step 0, for the masks: a sequence may be given in pieces (0).

    Returns:
        ``(h, c, h_n, c_n)``: h ``[T, B, R]`` and c ``[T, B, H]`` of every step, 0 beyond ``lengths``, and those of the
        last one (of the first with ``reverse``), ``[B, R]`` and ``[B, H]``.

    Raises:
        TypeError: something that is no tensor, dtypes that do not go together.
        ValueError: a wrong shape, device or option.

    >>> import torch
    >>> x, weight_ih, weight_hh = torch.randn(5, 3, 8), torch.randn(16, 8), torch.randn(16, 4)
    >>> h, c, h_n, c_n = lstm(x, None, weight_ih, weight_hh)
    >>> h.shape, torch.equal(h[-1], h_n)
    (torch.Size([5, 3, 4]), True)
    """
    layer_norm = (weight_ln_ih, weight_ln_hh, weight_ln_c, bias_ln_c)
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_peephole, *layer_norm)
    variant = as_variant(layer_norm_eps, zoneout, variational_dropout, recurrent_dropout, cell_clip)
    check_data("x", x)
    if x.dim() != 3 or x.size(0) == 0:
        raise ValueError(f"x: expected shape [T, B, I] with T > 0, got {list(x.shape)}")
    if not isinstance(first_step, int) or first_step < 0:
        raise ValueError(f"first_step: expected an integer of at least 0, got {first_step!r}")
    check_weights(x, weights, x.dtype)
    batch, hidden = x.size(1), weight_hh.size(0) // 4
    if hx is None:
        hx = x.new_zeros(batch, weight_hh.size(1)), x.new_zeros(batch, hidden)
    h0, c0 = as_pair(hx)
    check_states((h0, c0), x, weights, (batch,))
    return lstm_layer(
        x,
        h0,
        c0,
        weights,
        variant,
        reverse=reverse,
        lengths=checked_lengths(lengths, x),
        seed=checked_seed(seed, x.device) if training and variant.is_random() else None,
        first_step=first_step,
        kernel=runs_on_kernel(x),
    )


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    *,
    training: bool = False,
    weight_peephole: Tensor | None = None,
    weight_ln_ih: Tensor | None = None,
    weight_ln_hh: Tensor | None = None,
    weight_ln_c: Tensor | None = None,
    bias_ln_c: Tensor | None = None,
    layer_norm_eps: float = 1e-5,
    zoneout: Pair = 0.0,
    variational_dropout: Pair = 0.0,
    recurrent_dropout: float = 0.0,
    cell_clip: float | None = None,
    seed: Seed = None,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """One step of :func:`lstm`: ``(h, c)``, ``[B, H]`` each, from ``x`` ``[B, I]``; the other arguments are as there.

    ``step`` is the number of this step, for the masks: the same seed with it at 0, 1, ... gives those of ``lstm``.

    >>> import torch
    >>> x, weight_ih, weight_hh = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16, 4)
    >>> h, c = lstm_cell(x, None, weight_ih, weight_hh)
    >>> h, c = lstm_cell(x, (h, c), weight_ih, weight_hh)
    >>> h.shape
    torch.Size([3, 4])
    """
    check_data("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected shape [B, I], got {list(x.shape)}")
    return lstm(
        x.unsqueeze(0),
        hx,
        weight_ih,
        weight_hh,
        bias_ih,
        bias_hh,
        training=training,
        weight_peephole=weight_peephole,
        weight_ln_ih=weight_ln_ih,
        weight_ln_hh=weight_ln_hh,
        weight_ln_c=weight_ln_c,
        bias_ln_c=bias_ln_c,
        layer_norm_eps=layer_norm_eps,
        zoneout=zoneout,
        variational_dropout=variational_dropout,
        recurrent_dropout=recurrent_dropout,
        cell_clip=cell_clip,
        seed=seed,
        first_step=step,
    )[2:]
