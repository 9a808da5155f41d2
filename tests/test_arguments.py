"""``_C.BatchNormActArguments``: the one look at all tensors of a call that lets the usual call skip all else.

Answering False is always safe, it only costs time; answering True of tensors the ops can not take is not. The ops are
the judge: what fits must pass through them without a copy.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepops._autograd import ARGUMENTS

pytestmark = pytest.mark.skipif(ARGUMENTS is None, reason="the module _C was not built")

C = 6


class Labelled(torch.Tensor):
    """A subclass of Tensor."""


def usual(**changes):
    """Arguments of ``fit`` that do fit, but for ``changes``."""
    arguments = {
        "x": torch.randn(4, C, 5, 5),
        "residual": None,
        "weight": nn.Parameter(torch.rand(C)),
        "bias": nn.Parameter(torch.rand(C)),
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
        "num_batches_tracked": torch.tensor(0),
        "training": True,
    }
    return arguments | changes


DATA = torch.randn(4, C, 5, 5)
LAYOUTS = {
    "NCHW": DATA,
    "channels_last": DATA.contiguous(memory_format=torch.channels_last),
    "NC": torch.randn(4, C),
    "NCL": torch.randn(4, C, 5),
    "NCDHW": torch.randn(2, C, 3, 4, 5),
    "channels_last_3d": torch.randn(2, C, 3, 4, 5).contiguous(memory_format=torch.channels_last_3d),
    "one channel": torch.randn(4, 1, 5, 5),
    "1x1 image": torch.randn(4, C, 1, 1).contiguous(memory_format=torch.channels_last),
    "one sample": torch.randn(1, C, 5, 5).contiguous(memory_format=torch.channels_last),
    "offset": torch.randn(5, C, 5, 5)[1:],
    "requires grad": torch.randn(4, C, 5, 5, requires_grad=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_what_fits_goes_through_the_ops(name, dtype):
    x = LAYOUTS[name].to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    vectors = [torch.rand(x.size(1), dtype=wide) for _ in range(4)]
    residual = torch.randn_like(x)
    weight, bias, mean, var = vectors
    counter = torch.tensor(0)
    assert ARGUMENTS.fit(x, residual, weight, bias, mean, var, counter, True)
    assert ARGUMENTS.same_layout(residual, x)
    y, batch_mean, invstd = torch.ops.deepops.batch_norm_act_train(
        x, residual, weight, bias, mean, var, counter, 0.1, 1e-5, "relu", 0.01
    )
    assert ARGUMENTS.same_layout(y, x)
    torch.ops.deepops.batch_norm_act_backward(
        residual, x, y, weight, bias, batch_mean, invstd, True, "relu", 0.01, True, True, True
    )


def test_absent_tensors_fit():
    nothing = dict.fromkeys(["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
    assert ARGUMENTS.fit(**usual(**nothing))
    assert ARGUMENTS.fit(**usual(training=False))
    assert ARGUMENTS.fit(**usual(training=False, num_batches_tracked=None))


UNFIT = {
    "not a tensor": {"x": [1.0]},
    "subclass": {"x": DATA.as_subclass(Labelled)},
    "rank 1": {"x": torch.randn(C)},
    "integers": {"x": torch.ones(4, C, 5, 5, dtype=torch.int64)},
    "complex": {"x": torch.ones(4, C, 5, 5, dtype=torch.complex64)},
    "8-bit float": {"x": torch.ones(4, C, 5, 5).to(torch.float8_e5m2)},
    "meta": {"x": torch.empty(4, C, 5, 5, device="meta")},
    "sparse": {"x": DATA.to_sparse()},
    "empty": {"x": torch.randn(0, C, 5, 5)},
    "sliced": {"x": torch.randn(4, C, 5, 7)[..., :5]},
    "expanded": {"x": torch.randn(1, C, 5, 5).expand(4, -1, -1, -1)},
    "transposed": {"x": torch.randn(4, C, 5, 5).transpose(2, 3)},
    "transposed, rank 2": {"x": torch.randn(C, 4).t()},
    "one value per channel": {"x": torch.randn(1, C, 1, 1)},
    "residual: shape": {"residual": torch.randn(4, C, 5, 4)},
    "residual: layout": {"residual": DATA.contiguous(memory_format=torch.channels_last)},
    "residual: dtype": {"residual": DATA.double()},
    "residual: subclass": {"residual": DATA.as_subclass(Labelled)},
    "weight: length": {"weight": torch.rand(C + 1)},
    "weight: rank": {"weight": torch.rand(C, 1)},
    "weight: dtype": {"weight": torch.rand(C).double()},
    "weight: 16-bit": {"weight": torch.rand(C).half()},
    "weight: integers": {"weight": torch.ones(C, dtype=torch.int32)},
    "bias: strides": {"bias": torch.rand(2 * C)[::2]},
    "running_mean: meta": {"running_mean": torch.empty(C, device="meta")},
    "running_var: not a tensor": {"running_var": 1.0},
    "running_var: 16-bit beside 16-bit": {"x": DATA.half(), "running_var": torch.ones(C).half()},
    "num_batches_tracked: dtype": {"num_batches_tracked": torch.tensor(0, dtype=torch.int32)},
    "num_batches_tracked: float": {"num_batches_tracked": torch.tensor(0.0, dtype=torch.float64)},
    "num_batches_tracked: size": {"num_batches_tracked": torch.zeros(2, dtype=torch.int64)},
    "evaluation without a mean": {"training": False, "running_mean": None},
    "evaluation without a variance": {"training": False, "running_var": None},
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit(name):
    assert not ARGUMENTS.fit(**usual(**UNFIT[name]))
    assert ARGUMENTS.fit(**usual()), "and no error is left behind"


def test_wrapped_by_a_transform():
    """torch.func hands out tensors of type Tensor that have no memory of their own."""
    seen, others = [], usual()

    def look(x):
        seen.append(ARGUMENTS.fit(**(others | {"x": x})))
        return x.sum()

    torch.func.vmap(look)(torch.randn(3, 4, C, 5, 5))
    torch.func.grad(look)(torch.randn(4, C, 5, 5))
    assert seen == [False, False]


@pytest.mark.parametrize("other", ["sliced", "expanded", "subclass", "meta", "integers", "empty", "not a tensor"])
def test_another_layout(other):
    assert not ARGUMENTS.same_layout(UNFIT[other]["x"], DATA)


def test_layouts_of_one_shape_differ():
    assert not ARGUMENTS.same_layout(LAYOUTS["channels_last"], LAYOUTS["NCHW"])
    assert ARGUMENTS.same_layout(LAYOUTS["NCHW"], LAYOUTS["requires grad"])
