"""What ``deepops train`` can train: each model and optimizer once in stock PyTorch and once with deepops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

import deepops.nn
import deepops.nn.convert
import deepops.optim
from deepops.cli.text import SYMBOLS


class StockCNN(nn.Module):
    """The course module's CNN in plain PyTorch: [N, 1, 28, 28] -> [N, 10]."""

    def __init__(self, num_classes: int = 10) -> None:
        """``num_classes``: how many classes to tell apart."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(64 * 7 * 7, 128),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, 10] of the images ``x`` [N, 1, 28, 28]."""
        x = self.features(x)
        return self.classifier(torch.flatten(x, 1))  # type: ignore[no-any-return]


class DeepopsCNN(StockCNN):
    """The same network: convolution, BatchNorm and ReLU of each block are one deepops layer."""

    def __init__(self, num_classes: int = 10) -> None:
        """``num_classes``: how many classes to tell apart."""
        super().__init__(num_classes)
        self.features = nn.Sequential(
            deepops.nn.ConvBNReLU2d(1, 32, kernel_size=3, padding=1, bias=True),
            nn.MaxPool2d(kernel_size=2, stride=2),
            deepops.nn.ConvBNReLU2d(32, 64, kernel_size=3, padding=1, bias=True),
            nn.MaxPool2d(kernel_size=2, stride=2),
        )


class StockLSTM(nn.Module):
    """Reads an image row by row, as a sequence of 28 steps of 28 numbers: [N, 1, 28, 28] -> [N, 10]."""

    layer: Callable[..., nn.Module] = nn.LSTM

    def __init__(self, num_classes: int = 10, hidden_size: int = 128) -> None:
        """``num_classes``: how many classes to tell apart. ``hidden_size``: of the LSTM's state."""
        super().__init__()
        self.lstm = self.layer(28, hidden_size, batch_first=True)
        self.classifier = nn.Linear(hidden_size, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, 10] of the images ``x`` [N, 1, 28, 28]: from the state after the last row."""
        _, (h_n, _) = self.lstm(x.squeeze(1))
        return self.classifier(h_n[-1])  # type: ignore[no-any-return]


class DeepopsLSTM(StockLSTM):
    """The same network with the LSTM of deepops."""

    layer = deepops.nn.LSTM


class StockTextLSTM(nn.Module):
    """Predicts each byte of a text from those before it: [N, T] -> scores [N, 256, T]."""

    layer: Callable[..., nn.Module] = nn.LSTM

    def __init__(self, embedding_size: int = 64, hidden_size: int = 128) -> None:
        """``embedding_size``: numbers that stand for a byte. ``hidden_size``: of the LSTM's state."""
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, embedding_size)
        self.lstm = self.layer(embedding_size, hidden_size, batch_first=True)
        self.classifier = nn.Linear(hidden_size, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        """Scores [N, 256, T] of what follows each of the bytes ``x`` [N, T]; the state begins with zeros."""
        y, _ = self.lstm(self.embedding(x))
        return self.classifier(y).transpose(1, 2)  # type: ignore[no-any-return]


class DeepopsTextLSTM(StockTextLSTM):
    """The same network with the LSTM of deepops."""

    layer = deepops.nn.LSTM


@dataclass(frozen=True)
class ModelPair:
    """One network, built with stock layers and with those of deepops."""

    stock: Callable[[], nn.Module]
    deepops: Callable[[], nn.Module]
    note: str = ""  # what a reader of the comparison must know
    data: str = "images"  # or "text": what it takes


@dataclass(frozen=True)
class OptimizerPair:
    """One update rule: torch's class, the class of deepops, and the arguments both get."""

    stock: Callable[..., torch.optim.Optimizer]
    deepops: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, side: str, parameters: ParamsT, **options: Any) -> torch.optim.Optimizer:
        """The optimizer of one side ("stock" or "deepops"); ``options`` go before those of the pair."""
        make = self.stock if side == "stock" else self.deepops
        return make(parameters, **{**self.options, **options})


DEFAULT_DATA = {"images": "digits", "text": "python"}  # by what a model takes

# A later model or optimizer is one more line here.
MODELS = {
    "cnn": ModelPair(
        StockCNN,
        DeepopsCNN,
        note="the block's output, which the fused layer itself need not keep, is kept by the max-pooling after it",
    ),
    "lstm": ModelPair(StockLSTM, DeepopsLSTM),
    "lstm-text": ModelPair(StockTextLSTM, DeepopsTextLSTM, data="text"),
}
OPTIMIZERS = {
    "adam": OptimizerPair(torch.optim.Adam, deepops.optim.Adam, {"lr": 1e-3, "weight_decay": 1e-4}),
    "rmsprop": OptimizerPair(torch.optim.RMSprop, deepops.optim.RMSprop, {"lr": 1e-3, "weight_decay": 1e-4}),
    "sgd": OptimizerPair(torch.optim.SGD, deepops.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 1e-4}),
}


def build_pair(name: str, seed: int) -> dict[str, nn.Module]:
    """Both versions of a model, on the CPU, with the same weights: the stock one's, as ``seed`` draws them."""
    torch.manual_seed(seed)
    stock, fused = MODELS[name].stock(), MODELS[name].deepops()
    fused.load_state_dict(deepops.nn.convert.map_state_dict(stock.state_dict(), stock, fused))
    return {"stock": stock, "deepops": fused}


def stock_state_dict(name: str, model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a trained model, on the CPU, under the names of its plain PyTorch version."""
    state = deepops.nn.convert.map_state_dict(model.state_dict(), model, MODELS[name].stock())
    return {key: value.detach().cpu().clone() for key, value in state.items()}
