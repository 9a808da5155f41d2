"""``deepops train --gradient-flow``: how large the gradient of every layer is at every step.

The optimizer measures it in its own step (``diagnostics=True``); nothing else reads the gradients.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import deepops
from deepops.cli.data import load_data
from deepops.cli.errors import UserError, require
from deepops.cli.flow_models import build_networks
from deepops.cli.models import OPTIMIZERS
from deepops.cli.side import Side
from deepops.cli.train import INTERRUPTED, Session, find_device, output_folder, stop_on_interrupt, train
from deepops.optim import TensorFacts


@dataclass(frozen=True)
class StepFacts:
    """What one step measured."""

    scale: float  # of the loss, and so of the measured gradients: 1 but in fp16
    parameters: dict[str, TensorFacts]

    @property
    def skipped(self) -> bool:
        """Whether the scaler of fp16 saw a gradient that is not finite: the step changed nothing."""
        return self.non_finite and not any(measured.update_norm for measured in self.parameters.values())

    @property
    def non_finite(self) -> bool:
        """Whether an element of any gradient is infinite or NaN."""
        return any(measured.non_finite for measured in self.parameters.values())

    def grad_norm(self, name: str) -> float:
        """The norm of a parameter's gradient, unscaled; infinite or NaN where an element is."""
        return self.parameters[name].grad_norm / self.scale


class MeasuredSide(Side):
    """A side that keeps what its optimizer measures."""

    def __init__(self, model: nn.Module, optimizer: Any, device: torch.device, precision: str) -> None:
        """``optimizer`` is one of deepops with ``diagnostics=True``."""
        super().__init__(model, optimizer, device, precision)
        self.facts: list[StepFacts] = []  # of every step
        # The weights of layers, in the order of the network; biases and normalization have one dimension.
        self.layers = [name for name, param in model.named_parameters() if param.dim() > 1]

    def step(self, images: Tensor, targets: Tensor) -> float:
        """One training step; returns its loss."""
        scale = self.scaler.get_scale()
        loss = super().step(images, targets)
        self.facts.append(StepFacts(scale, self.optimizer.diagnostics))  # type: ignore[attr-defined]
        return loss


def run_gradient_flow(arguments: argparse.Namespace) -> int:
    """Train, print and write the results; 0, or 130 when Ctrl-C ended the training early.

    Raises:
        UserError: the device, the data, a package, the kernel or the output folder is not available.
    """
    require("rich", "matplotlib")
    from deepops.cli.flow_report import print_table, write_results
    from deepops.cli.progress import Progress

    device = find_device(arguments.device)
    data = load_data(arguments.data, arguments.seed)
    sides = prepare(arguments, device)
    out = output_folder(arguments, data)
    session = Session(arguments, device, data, dict(sides))
    with stop_on_interrupt() as stop, Progress(session) as progress:
        session.interrupted = not train(session, progress, stop)
    print_table(session, sides)
    write_results(session, sides, out)
    return INTERRUPTED if session.interrupted else 0


def prepare(arguments: argparse.Namespace, device: torch.device) -> dict[str, MeasuredSide]:
    """All networks with their optimizers, ready for the first step.

    Raises:
        UserError: the optimizer has no kernel here, and so nothing to measure with.
    """
    sides = {}
    for title, model in build_networks(arguments.model, arguments.seed, contrast=arguments.contrast).items():
        torch.manual_seed(arguments.seed)  # on every device: where the dropout starts
        model.to(device)
        pair = OPTIMIZERS[arguments.optimizer]
        optimizer = pair.build("deepops", model.named_parameters(), diagnostics=True)
        _, elsewhere, why = deepops.explain(optimizer).partition("torch, because ")
        if elsewhere:
            raise UserError(f"--gradient-flow: needs the kernel of {arguments.optimizer}: {why.splitlines()[0]}")
        sides[title] = MeasuredSide(model, optimizer, device, arguments.precision)
    return sides
