"""Layers with the constructor, state_dict and results of the ``torch.nn`` layers they replace."""

from __future__ import annotations

from deepops.nn import convert
from deepops.nn.batch_norm_act import BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from deepops.nn.conv_bn_act import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d
from deepops.nn.conv_bn_relu import ConvBNReLU1d, ConvBNReLU2d, ConvBNReLU3d
from deepops.nn.lstm import LSTM
from deepops.nn.lstm_cell import LSTMCell

__all__ = [
    "LSTM",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "ConvBNAct1d",
    "ConvBNAct2d",
    "ConvBNAct3d",
    "ConvBNReLU1d",
    "ConvBNReLU2d",
    "ConvBNReLU3d",
    "LSTMCell",
    "convert",
]
