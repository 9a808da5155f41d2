"""The networks of ``deepops train --gradient-flow``: the one that was asked for, and some to contrast it with."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from deepops.cli.data import CLASSES, SIDE
from deepops.cli.models import MODELS, build_pair

DEPTH, WIDTH = 10, 64  # of the plain nets


def build_networks(name: str, seed: int, *, contrast: bool) -> dict[str, nn.Module]:
    """The networks by title, on the CPU, with the weights that ``seed`` draws; images [N, 1, 28, 28] -> scores [N, 10].

    A tanh net with large weights is the textbook's case of exploding gradients: its activations are bounded, but each
    layer's Jacobian stretches (Schoenholz et al., *Deep Information Propagation*, 2017).
    """
    networks = {name: build_pair(name, seed)["deepops"]}
    if contrast:
        if any(isinstance(module, nn.BatchNorm2d) for module in MODELS[name].stock().modules()):
            networks[f"{name} without batch norm"] = _without_batch_norm(name, seed)
        networks["deep sigmoid net"] = _plain_net(nn.Sigmoid, 1.0, seed)
        networks["deep tanh net with large weights"] = _plain_net(nn.Tanh, 5.0, seed)
    return networks


def _without_batch_norm(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)  # batch norm draws nothing: the other weights are those of the network with it
    network = MODELS[name].stock()
    for module in network.modules():
        for child_name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, child_name, nn.Identity())
    return network


def _plain_net(activation: Callable[[], nn.Module], gain: float, seed: int) -> nn.Module:
    """``DEPTH`` linear layers, an activation between them; weights are normal with deviation gain / sqrt(inputs)."""
    torch.manual_seed(seed)
    widths = [SIDE * SIDE, *[WIDTH] * (DEPTH - 1), CLASSES]
    network = nn.Sequential(nn.Flatten())
    for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
        linear = nn.Linear(inputs, outputs)
        nn.init.normal_(linear.weight, std=gain / math.sqrt(inputs))
        nn.init.zeros_(linear.bias)
        network.add_module(f"linear{number}", linear)
        if number < DEPTH:
            network.add_module(f"activation{number}", activation())
    return network
