"""Argument checks of the LSTM: torch's own words where it has some, else what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepops._checks import check_data, transforms_active
from deepops._lstm_types import Variant, Weights

Seed = int | Tensor | None
Pair = float | tuple[float, float]


def as_variant(
    layer_norm_eps: float = 1e-5,
    zoneout: Pair = 0.0,
    variational_dropout: Pair = 0.0,
    recurrent_dropout: float = 0.0,
    cell_clip: float | None = None,
) -> Variant:
    """The options in the form that ``lstm_layer`` takes."""
    if not is_number(layer_norm_eps) or not layer_norm_eps >= 0:
        raise ValueError(f"layer_norm_eps: expected a number of at least 0, got {layer_norm_eps!r}")
    if cell_clip is not None and not (is_number(cell_clip) and cell_clip > 0):
        raise ValueError(f"cell_clip: expected a positive number or None, got {cell_clip!r}")
    return Variant(
        float(layer_norm_eps),
        None if cell_clip is None else float(cell_clip),
        *_probabilities("zoneout", "(h, c)", zoneout),
        *_probabilities("variational_dropout", "(input, hidden)", variational_dropout),
        _probability("recurrent_dropout", "a number", recurrent_dropout),
    )


def is_number(value: object) -> bool:
    """Whether ``value`` is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _probability(name: str, wanted: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected {wanted} in [0, 1], got {value!r}")
    return float(value)


def _probabilities(name: str, meaning: str, value: object) -> tuple[float, float]:
    """One for both, or two."""
    wanted = f"a number or two, {meaning},"
    if not isinstance(value, (tuple, list)):
        return (_probability(name, wanted, value),) * 2
    if len(value) != 2:
        raise ValueError(f"{name}: expected {wanted} in [0, 1], got {value!r}")
    return _probability(name, wanted, value[0]), _probability(name, wanted, value[1])


def checked_lengths(lengths: Tensor | Sequence[int] | None, x: Tensor) -> Tensor | None:
    """``lengths`` as an int64 tensor on the device of ``x``, [T, B, I]. Raise unless it fits.

    Values are looked at on the CPU alone: reading them from a GPU would make it wait.
    """
    if lengths is None:
        return None
    steps, batch = x.shape[:2]
    if not isinstance(lengths, Tensor):
        numbers = list(lengths) if isinstance(lengths, Sequence) else None
        if numbers is None or any(not isinstance(n, int) or isinstance(n, bool) for n in numbers):
            raise TypeError(f"lengths: expected an int64 tensor or a list of integers, got {lengths!r}")
        lengths = torch.tensor(numbers, dtype=torch.int64)
    if lengths.dtype is not torch.int64:
        raise TypeError(f"lengths: expected an int64 tensor or a list of integers, got a tensor of {lengths.dtype}")
    if lengths.dim() != 1 or lengths.size(0) != batch:
        raise ValueError(f"lengths: expected shape [{batch}], one per sequence, got {list(lengths.shape)}")
    if type(lengths) is Tensor and lengths.is_cpu and batch > 0 and not _traced():
        shortest, longest = (int(extreme) for extreme in torch.aminmax(lengths))
        if shortest < 0 or longest > steps:
            wrong = shortest if shortest < 0 else longest
            raise ValueError(f"lengths: expected numbers from 0 to {steps}, the steps of the input, got {wrong}")
    return lengths.to(x.device).contiguous()


def _traced() -> bool:
    """Whether tensors may have no values to look at."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or transforms_active()


def checked_seed(seed: Seed, device: torch.device) -> Tensor:
    """``seed`` as one int64 number on ``device``; None draws one from torch's generator of the device."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype is not torch.int64 or seed.numel() != 1:
            given = f"a tensor of {seed.dtype} and shape {list(seed.shape)}"
            raise TypeError(f"seed: expected an integer or one int64 number, got {given}")
        return seed.detach().reshape(1).to(device)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an integer or one int64 number, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed}")
    return torch.tensor([seed if seed < 2**63 else seed - 2**64], dtype=torch.int64, device=device)


def derived_seed(seed: Tensor, number: int) -> Tensor:
    """The seed of layer and direction ``number``, as torch counts them: forward and reverse of layer 0, of layer 1, ...

    ``seed + number * 0x9E3779B97F4A7C15``, modulo 2^64: that of number 0 is ``seed`` itself.
    """
    if number == 0:
        return seed
    step = number * 0x9E3779B97F4A7C15 % 2**64
    return seed + (step if step < 2**63 else step - 2**64)


def as_pair(hx: object) -> tuple[Tensor, Tensor]:
    """``hx`` as two tensors."""
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        given = f"{len(hx)} things" if isinstance(hx, (tuple, list)) else type(hx).__name__
        raise TypeError(f"hx: expected a pair of tensors, (h_0, c_0), got {given}")
    for i, state in enumerate(hx):
        check_data(f"hx[{i}]", state)
    return hx[0], hx[1]


def check_like_input(name: str, value: Tensor, x: Tensor, dtype: torch.dtype | None) -> None:
    """Raise unless ``value`` is where ``x`` is and of ``dtype``; None: autocast makes them one."""
    if dtype is not None and value.dtype is not dtype:
        raise TypeError(f"{name}: expected {dtype}, the dtype of input, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected device {x.device}, where input is, got {value.device}")


def check_weights(x: Tensor, weights: Weights, dtype: torch.dtype | None) -> None:
    """Raise unless the weights fit each other and ``x``, [..., I]."""
    for name, weight in zip(Weights._fields, weights, strict=True):
        if weight is None and name not in ("weight_ih", "weight_hh"):
            continue
        check_data(name, weight)
        assert weight is not None
        check_like_input(name, weight, x, dtype)
    hidden, rest = divmod(weights.weight_hh.size(0), 4) if weights.weight_hh.dim() == 2 else (0, 1)
    if rest:
        raise ValueError(f"weight_hh: expected shape [4 * H, R], got {list(weights.weight_hh.shape)}")
    state = hidden
    if weights.weight_hr is not None:
        state = weights.weight_hr.size(0)
        if not 0 < state < hidden:
            raise ValueError(f"weight_hr: expected shape [P, H] with P < H, got {list(weights.weight_hr.shape)}")
    gates = [4 * hidden]
    shapes = ([4 * hidden, x.size(-1)], [4 * hidden, state], gates, gates, [state, hidden], [3 * hidden], gates, gates)
    for name, weight, shape in zip(Weights._fields, weights, (*shapes, [hidden], [hidden]), strict=True):
        if weight is not None and list(weight.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(weight.shape)}")
    missing = [name for name in Weights._fields[6:] if getattr(weights, name) is None]
    if missing and len(missing) < 4:
        raise ValueError(f"{missing[0]}: expected a tensor beside the others of layer norm, got None")


def check_states(hx: tuple[Tensor, Tensor], x: Tensor, weights: Weights, batch: Sequence[int]) -> None:
    """Raise unless both states have the shape that goes with ``weights``."""
    hidden = weights.weight_hh.size(0) // 4
    for i, (state, size) in enumerate(zip(hx, (weights.weight_hh.size(1), hidden), strict=True)):
        if list(state.shape) != [*batch, size]:
            raise ValueError(f"hx[{i}]: expected shape {[*batch, size]}, got {list(state.shape)}")
        check_like_input(f"hx[{i}]", state, x, None)
