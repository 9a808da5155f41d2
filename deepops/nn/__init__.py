"""Layers with the constructor, state_dict and results of the ``torch.nn`` layers they replace."""

from __future__ import annotations

from deepops.nn import convert
from deepops.nn.batch_norm_act import BatchNormAct2d
from deepops.nn.conv_bn_act import ConvBNAct2d, ConvBNReLU2d

__all__ = ["BatchNormAct2d", "ConvBNAct2d", "ConvBNReLU2d", "convert"]
