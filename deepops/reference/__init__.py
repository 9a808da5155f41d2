"""Each op in 10-40 lines of plain PyTorch: oracle, documentation, and the path of devices without a kernel."""

from deepops.reference.batch_norm_act import ACTIVATIONS, activation, batch_norm_act
from deepops.reference.conv_bn_act import conv_bn_act_eval, conv_bn_act_statistics
from deepops.reference.depthwise_bn_act import depthwise_bn_act
from deepops.reference.pointwise_bn_act import pointwise_bn_act

__all__ = [
    "ACTIVATIONS",
    "activation",
    "batch_norm_act",
    "conv_bn_act_eval",
    "conv_bn_act_statistics",
    "depthwise_bn_act",
    "pointwise_bn_act",
]
