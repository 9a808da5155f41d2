"""What has no CUDA kernel, and why. What it computes runs on a GPU by other ops."""

# Families of ops, by the name of their kernel files.
FAMILIES = {
    # z is never stored, because its product is computed in the registers where it is used. A GPU kernel that does so is
    # a matrix product of its own on the tensor cores; until there is one, the convolution is ATen's and
    # batch_norm_act does the rest.
    "pointwise_bn_act",
}
# Single ops: steps of a public one, and what another op does on a GPU.
SINGLE = {
    # ATen's convolution with folded weights, and an activation.
    "depthwise_bn_act_eval",
    # cuBLAS' on a GPU.
    "_lstm_product",
    "_lstm_weight_gradient",
}


def is_cpu_only(op: str) -> bool:
    """Whether there is no CUDA kernel of ``op``, on purpose."""
    return op in SINGLE or any(op.startswith(family + "_") for family in FAMILIES)
