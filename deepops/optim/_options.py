"""Options that the optimizers of deepops have beyond torch's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

STATE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_SIXTEEN = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StepOptions:
    """What every optimizer of deepops takes by keyword, beside the arguments of torch's class of its name.

    Attributes:
        max_grad_norm: scale the gradients within the step so that the norm of all of them together is at most this, as
            ``torch.nn.utils.clip_grad_norm_`` would (None: do not). ``optimizer.grad_norm`` has it after the step. The
            gradients themselves stay as they are; but ``torch.amp.GradScaler``, which leaves them unscaled, leaves them
            clipped too. Of DTensors it is the norm of the whole gradient, the same on every process: shards are summed
            over their process groups (all processes of these have to step together), what is replicated counts once, as
            do plain tensors, of which every process is taken to have the same.
        master_weights: keep float32 weights beside parameters of 16 bits, update those and round them into the
            parameters. True: in ``state[p]["master_param"]``. "split": for bfloat16, in the parameter and 16 bits more,
            ``state[p]["master_low"]``, which together are the float32 number to the bit (but for those whose lower half
            is exactly midway above an even upper one: 2**-24 off); other dtypes as with True. A parameter that is
            written to between steps is noticed. The 16 bits of a DTensor can be saved by shard only: no backend of
            torch.distributed gathers int16. States are float32 unless ``state_dtype`` says otherwise.
        stochastic_rounding: round bfloat16 parameters and states up or down at random, so that the average is right and
            small updates are not lost. Not together with ``master_weights``.
        seed: of stochastic rounding (default: ``torch.initial_seed()`` at construction). Equal seeds give equal runs;
            processes that hold the same parameters (DDP, replicated DTensors) need the same seed to keep them the same.
        state_dtype: dtype of the moments of real parameters of up to 32 bits: float32, float16 or bfloat16 (default:
            the parameter's, or float32 with ``master_weights``). It is kept when a state_dict is loaded.
        diagnostics: measure each parameter in the step itself: see ``optimizer.diagnostics``; of a DTensor, the part of
            this process.
    """

    max_grad_norm: float | None = None
    master_weights: bool | Literal["split"] = False
    stochastic_rounding: bool = False
    seed: int | None = None
    state_dtype: torch.dtype | None = None
    diagnostics: bool = False

    @classmethod
    def of(cls, owner: str, given: dict[str, Any]) -> StepOptions:
        """Check keyword arguments of the optimizer class ``owner``."""
        names = {field.name for field in fields(cls)}
        for name in given:
            if name not in names:
                raise TypeError(f"{owner}.__init__() got an unexpected keyword argument {name!r}")
        options = cls(**given)
        norm = options.max_grad_norm
        if norm is not None and (
            isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < math.inf
        ):
            raise ValueError(f"max_grad_norm: expected a positive number or None, got {norm!r}")
        if not (isinstance(options.master_weights, bool) or options.master_weights == "split"):
            raise ValueError(f"master_weights: expected False, True or 'split', got {options.master_weights!r}")
        if options.state_dtype not in (None, *STATE_DTYPES):
            raise ValueError(
                f"state_dtype: expected torch.float32, torch.float16, torch.bfloat16 or None, got {options.state_dtype}"
            )
        for name in ("stochastic_rounding", "diagnostics"):
            if not isinstance(getattr(options, name), bool):
                raise TypeError(f"{name}: expected a bool, got {getattr(options, name)!r}")
        if options.seed is not None and not (isinstance(options.seed, int) and 0 <= options.seed < 2**64):
            raise ValueError(f"seed: expected an integer from 0 to 2**64 - 1 or None, got {options.seed!r}")
        if options.seed is not None and not options.stochastic_rounding:
            raise ValueError("seed is for stochastic_rounding=True")
        if options.stochastic_rounding and options.master_weights:
            raise ValueError("stochastic_rounding and master_weights exclude each other: masters lose nothing")
        if options.stochastic_rounding and options.seed is None:
            return cls(**{**given, "seed": torch.initial_seed() % 2**64})
        return options

    def master_of(self, param: torch.Tensor) -> tuple[str, torch.dtype] | None:
        """Name and dtype of the state that keeps this parameter in float32; None: it has none."""
        if not self.master_weights or param.dtype not in _SIXTEEN:
            return None
        if self.master_weights == "split" and param.dtype is torch.bfloat16:
            return "master_low", torch.int16
        return "master_param", torch.float32

    def state_dtype_of(self, param: torch.Tensor) -> torch.dtype:
        """Dtype of the moments of this parameter."""
        if param.dtype is torch.float64 or param.is_complex():
            return param.dtype
        if self.state_dtype is not None:
            return self.state_dtype
        return torch.float32 if self.master_of(param) else param.dtype
