"""Compares the same op calls on several backends: ``python -m benchmarks.compare cpu simt cuda``.

Prints for each output whether it equals the first backend's, or how far it is off. Optimizers promise equal bits
everywhere: a difference there fails. Batch normalization sums in another order on each backend; the tests judge it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import deepops.functional  # noqa: F401 - loads the binaries

BACKENDS = {"cpu": ("deepops", "cpu"), "simt": ("deepops_simt", "cpu"), "cuda": ("deepops", "cuda")}
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
Outputs = dict[str, Tensor]  # by name


def call(backend: str, op: str, *arguments: object, **options: object) -> object:
    """Call an op of ``backend`` with arguments that lie on the CPU and are moved; returns what it returns."""
    namespace, device = BACKENDS[backend]

    def moved(value: object) -> object:
        if isinstance(value, Tensor):
            return value.to(device)
        return [moved(part) for part in value] if isinstance(value, list) else value

    return getattr(getattr(torch.ops, namespace), op)(*map(moved, arguments), **options)


def optimizer_step(
    op: str, states: dict[str, Callable[[Tensor], Tensor]], backend: str, dtype: torch.dtype, **options: object
) -> Outputs:
    """Three steps of a tensor that is no multiple of any vector, and a small one. states: made of normal numbers."""
    generator = torch.Generator().manual_seed(1)
    device = BACKENDS[backend][1]
    shapes = ((3, 1001), (7,))

    def draw() -> list[Tensor]:
        return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device) for shape in shapes]

    params = draw()
    values = {name: [make(tensor) for tensor in draw()] for name, make in states.items()}
    steps = [torch.zeros((), device=device) for _ in shapes]
    for _ in range(3):
        call(backend, op, params, draw(), *values.values(), steps, **options)
    return {"param": params[0], "small param": params[1], **{name: value[0] for name, value in values.items()}}


def adam(backend: str, dtype: torch.dtype) -> Outputs:
    """Adam with every state."""
    states = {"exp_avg": torch.clone, "exp_avg_sq": torch.abs, "max_exp_avg_sq": torch.abs}
    options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True,
               "maximize": False, "decoupled_weight_decay": False}  # fmt: skip
    return optimizer_step("adam", states, backend, dtype, **options)


def sgd(backend: str, dtype: torch.dtype) -> Outputs:
    """SGD with Nesterov's momentum."""
    options = {"lr": 1e-2, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "maximize": False}
    return optimizer_step("sgd", {"momentum_buffer": torch.clone}, backend, dtype, **options)


def rmsprop(backend: str, dtype: torch.dtype) -> Outputs:
    """RMSprop with every state, which are such that no variance is negative."""
    states = {"square_avg": lambda t: 1 + t.abs(), "grad_avg": torch.tanh, "momentum_buffer": torch.clone}
    options = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9, "centered": True,
               "maximize": False}  # fmt: skip
    return optimizer_step("rmsprop", states, backend, dtype, **options)


def batch_norm_act(backend: str, dtype: torch.dtype) -> Outputs:
    """The training forward and its backward."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.float64 if dtype is torch.float64 else torch.float32

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, grad = draw(5, 12, 9, 11).to(dtype), draw(5, 12, 9, 11).to(dtype)
    weight, bias = draw(12).to(wide), draw(12).to(wide)
    forward = (x, None, weight, bias, None, None, None, None, 1e-5, "relu", 0.0)
    y, mean, invstd = call(backend, "batch_norm_act_train", *forward)
    backward = (grad, x, None, weight, bias, mean, invstd, True, "relu", 0.0, True, False, True)
    grad_x, _, grad_weight, grad_bias = call(backend, "batch_norm_act_backward", *backward)
    return {
        "y": y,
        "mean": mean,
        "invstd": invstd,
        "grad_x": grad_x,
        "grad_weight": grad_weight,
        "grad_bias": grad_bias,
    }


CASES: dict[str, tuple[Callable[[str, torch.dtype], Outputs], bool]] = {
    "adam": (adam, True),  # equal bits are promised
    "sgd": (sgd, True),
    "rmsprop": (rmsprop, True),
    "batch_norm_act": (batch_norm_act, False),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the named backends with the first of them. Returns 1 where promised bits differ."""
    first, *others = sys.argv[1:] if arguments is None else arguments
    if "simt" in (first, *others):
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
        import simt

        simt.load()
    failed = False
    for name, (case, promised) in CASES.items():
        for dtype in DTYPES:
            expected = case(first, dtype)
            for backend in others:
                parts = []
                for output, value in case(backend, dtype).items():
                    ours, theirs = value.cpu(), expected[output].cpu()
                    equal = float((ours == theirs).double().mean())
                    failed |= promised and equal < 1
                    far = float((ours.double() - theirs.double()).abs().max())
                    parts.append(f"{output} equal" if equal == 1 else f"{output} {equal:.1%} equal, off by {far:.1e}")
                kind = str(dtype).removeprefix("torch.")
                print(f"{name} {kind}, {backend} against {first}: {'; '.join(parts)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
