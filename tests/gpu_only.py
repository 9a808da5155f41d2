"""What has no CPU kernel, and why."""

# Families of ops, by the name of their .cu files.
FAMILIES = {
    # A convolution and what follows it in one kernel, where that is faster than cuDNN's and a kernel of ours. On the
    # CPU the convolution is oneDNN's.
    "conv_bn_act",
}


def is_gpu_only(op: str) -> bool:
    """Whether there is no CPU kernel of ``op``, on purpose."""
    return any(op.startswith(family + "_") for family in FAMILIES)
