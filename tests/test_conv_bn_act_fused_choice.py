"""Which calls of the blocks go to deepops' own convolution: what it covers, other tools, the choice by time.

Torch's operations stand in for the kernels (fixture ``exact_conv``), a made-up clock for the GPU's (``timed_conv``).
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import make_block, make_input, needs_kernel
from fused_conv_cases import ACTIVATIONS, CHANNELS_LAST, Exact, assert_same_bits, data, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import deepops
from deepops import _conv_choice, _conv_problem, _fused_conv
from deepops.functional import conv_bn_act
from deepops.nn import ConvBNAct1d, ConvBNAct2d

pytestmark = [pytest.mark.usefixtures("one_thread"), needs_kernel]


# ---- what is not covered ---------------------------------------------------------------------------------------------


def wide(channels: int = 8, dtype: torch.dtype = torch.float16) -> Tensor:
    return data(channels=channels).to(dtype)


NOT_COVERED: dict[str, tuple[str, Callable[[], tuple[Tensor, tuple[int, ...], dict[str, Any]]]]] = {
    "groups": ("groups=2", lambda: (data(), (6, 2, 3, 3), {"groups": 2})),
    "depthwise": ("groups=4", lambda: (data(), (4, 1, 3, 3), {"groups": 4})),
    "channels": ("12 channels of torch.float16", lambda: (wide(12), (6, 12, 3, 3), {})),
    "fp32": ("8 channels of torch.float32", lambda: (wide(8, torch.float32), (6, 8, 3, 3), {})),
    "fp64": ("x of torch.float64", lambda: (wide(4, torch.float64), (6, 4, 3, 3), {})),
    "NCHW": ("x of strides", lambda: (data().contiguous(), (6, 4, 3, 3), {})),
    "one channel in NCHW": ("x of strides", lambda: (torch.randn(2, 1, 8, 8), (6, 1, 3, 3), {})),
    "sliced": ("x of strides", lambda: (data()[..., ::2], (6, 4, 3, 3), {})),
    "1d": ("conv_weight of shape", lambda: (torch.randn(2, 4, 9), (6, 4, 3), {})),
    "3d": ("conv_weight of shape", lambda: (make_input(3), (6, 4, 3, 3, 3), {})),
    "misaligned": (
        "x that begins between 16-byte boundaries",
        lambda: (wide().new_zeros(2 * 8 * 81 + 1)[1:].view(2, 9, 9, 8).permute(0, 3, 1, 2), (6, 8, 3, 3), {}),
    ),
    "a class of its own": ("a tensor of class Own", lambda: (data().as_subclass(Own), (6, 4, 3, 3), {})),
}


class Own(Tensor):
    """May mean anything by its memory."""


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NOT_COVERED)
def test_what_is_not_covered(name: str, training: bool, timed_conv: dict[str, float], exact_conv: Exact) -> None:
    """An error where the way is forced, else torch's way without a word or a measurement."""
    message, make = NOT_COVERED[name]
    x, shape, options = make()
    weight = torch.randn(shape, dtype=x.dtype)
    vectors = torch.float64 if x.dtype is torch.float64 else torch.float32
    mean, var = torch.zeros(shape[0], dtype=vectors), torch.ones(shape[0], dtype=vectors)
    with (
        deepops.backends.flags(conv="fused"),
        pytest.raises(ValueError, match=f"deepops.backends.conv: 'fused' covers .*; got {message}"),
    ):
        conv_bn_act(x, weight, None, mean, var, training=training, **options)
    assert torch.equal(mean, torch.zeros_like(mean))
    timed_conv["aten"] = 0.0  # not that it matters
    conv_bn_act(x, weight, None, mean, var, training=training, **options)
    assert not exact_conv.calls
    assert not _conv_choice.measured()


def test_a_residual_of_another_dtype_under_autocast(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    """The sum has the wider dtype then."""
    block, x = make_block(4, 4, 3, padding=1), data()
    with torch.autocast("cpu", torch.bfloat16):
        with deepops.backends.flags(conv="fused"), pytest.raises(ValueError, match=r"a residual of torch.float32"):
            block(x, x)
        assert block(x, x).dtype is torch.float32
        assert not exact_conv.calls
        assert block(x, x.bfloat16()).dtype is torch.bfloat16
    assert exact_conv.calls


def test_a_build_or_a_gpu_without_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = wide(), torch.randn(6, 8, 3, 3).half()
    monkeypatch.setattr(_conv_problem, "has_kernel", lambda op, device: False)
    assert _conv_problem.not_covered(x, weight, 1, False).startswith("a build without these kernels (_cuda ")
    monkeypatch.setattr(_conv_problem, "has_kernel", lambda op, device: True)
    monkeypatch.setattr(_conv_problem, "gpu_not_covered", lambda index: "")
    for capability, reason in {(7, 5): "a GPU of compute capability 7.5", (8, 0): "", (12, 0): ""}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert _conv_problem.not_covered(x, weight, 1, False) == reason
    monkeypatch.setattr(_conv_problem, "gpu_not_covered", lambda index: "too old")
    assert _conv_problem.not_covered(x, weight, 1, False) == "too old"


def test_one_channel_has_the_layout_that_strides_tell() -> None:
    """As torch decides it for the result."""
    x, weight = torch.randn(2, 1, 8, 8), torch.randn(6, 1, 3, 3)
    for data_last in (False, True):
        for weight_last in (False, True):
            tensors = [
                t.to(memory_format=CHANNELS_LAST) if last else t for t, last in ((x, data_last), (weight, weight_last))
            ]
            stock = F.conv2d(*tensors).is_contiguous(memory_format=CHANNELS_LAST)
            assert _conv_problem._is_channels_last(*tensors) == stock


def test_other_tools_take_torchs_way(exact_conv: Exact) -> None:
    """Whatever the setting: they do not see into the ops, or have compilers of their own."""
    block, x = make_block(4, 6, 3), data()
    weight = block.conv.weight.detach()

    def loss(weight: Tensor) -> Tensor:
        return conv_bn_act(x, weight, None, None, None, training=True).square().sum()

    torch.func.grad(loss)(weight)
    torch.func.jvp(loss, (weight,), (torch.ones_like(weight),))
    torch.jit.trace(block, x, check_trace=False)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    with torch.no_grad():
        compiled.eval()(x)
    assert not exact_conv.calls
    block.train()(x)
    assert exact_conv.calls


def test_fake_tensors_take_torchs_way(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    """They have no memory to look at, and nothing to time."""
    block = make_block(4, 6, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert block(data()).shape == (4, 6, 9, 8)
        with torch.no_grad():
            assert block.eval()(data()).shape == (4, 6, 9, 8)
    assert not exact_conv.calls


def test_cpu_tensors_know_no_choice() -> None:
    assert _conv_problem.executor is None
    block, x = make_block(4, 6, 3, groups=2), make_input(2)
    expected = copy.deepcopy(block)(x)
    with deepops.backends.flags(conv="fused"):
        assert torch.equal(block(x), expected)
        block.eval()(x)
        ConvBNAct1d(4, 6, 3)(torch.randn(2, 4, 9))


# ---- the choice ------------------------------------------------------------------------------------------------------


def test_the_faster_way_is_taken_and_measuring_teaches_nothing(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    once = _conv_choice.WARM_UP + _conv_choice.ROUNDS
    for way in ("fused", "aten"):
        timed_conv.update({"fused": 1.0, "aten": 1.0, way: 0.5})
        _conv_choice.forget()
        exact_conv.calls.clear()
        block, x = make_block(4, 6, 3, bias=True).to(memory_format=CHANNELS_LAST), data()
        with deepops.backends.flags(conv="aten"):
            expected = step(block, x, None)
        ours = copy.deepcopy(block)
        results = step(ours, x, None)
        assert exact_conv.calls == ["statistics"] * (once + (way == "fused"))
        assert_same_bits(results, expected, way)
        assert results["bn.num_batches_tracked"] == 1
        step(ours, x, None)
        assert exact_conv.calls == ["statistics"] * (once + 2 * (way == "fused"))


def test_what_is_torchs_is_known_at_a_glance(
    timed_conv: dict[str, float], exact_conv: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small networks on a GPU wait for Python: a call that goes torch's way anyway must not be looked at again."""
    looked = []
    look = _fused_conv.problem_of
    monkeypatch.setattr(_fused_conv, "problem_of", lambda *arguments: looked.append(1) or look(*arguments))
    timed_conv["fused"] = 3.0
    blocks = [make_block(4, 6, 3, groups=groups) for groups in (1, 2)]
    for _ in range(3):
        for block in blocks:
            block.train()(data())
            with torch.no_grad():
                block.eval()(data())
    assert len(looked) == 4
    for changed in (data(3), data()[:, :, 1:].contiguous(memory_format=CHANNELS_LAST), data().bfloat16().float()):
        blocks[0].train()(changed)
    with torch.autocast("cpu", torch.bfloat16):
        blocks[0](data())
    conv_bn_act(data(), blocks[0].conv.weight, None, None, None, training=True, stride=[1, 2], padding=[0, 0])
    assert len(looked) == 8  # the last of the three is nothing new
    before = len(exact_conv.calls)
    other = make_block(4, 7, 3)
    other(data().contiguous())
    assert len(exact_conv.calls) == before
    other(data())
    assert len(exact_conv.calls) > before  # the same but for its strides
    assert set(exact_conv.calls) == {"eval", "statistics"}
    count = len(exact_conv.calls)
    with deepops.backends.flags(conv="fused"):
        blocks[0](data())
    assert len(exact_conv.calls) == count + 1
    torch.use_deterministic_algorithms(True)
    try:
        timed_conv["fused"] = 1.0
        _conv_choice.forget()
        blocks[0](data())
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(exact_conv.calls) == count + 1
    blocks[0](data())
    assert len(exact_conv.calls) > count + 1  # it was torch's for that time alone


def test_the_choice_is_one_of_the_process(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    """Copies and pickles of a block, and other blocks of its shapes, know it."""
    block, x = make_block(4, 6, 3), data()
    block(x)
    count = len(exact_conv.calls)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block)), make_block(4, 6, 3, seed=1)):
        other(x)
        count += 1
        assert len(exact_conv.calls) == count
        assert deepops.explain(other) == deepops.explain(block)
    assert len(_conv_choice.measured()) == 1


def test_explain_tells_ways_and_times(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    block, x = make_block(4, 6, 3, padding=1), data(2)
    before = deepops.explain(block)
    block(x)
    timed_conv["fused"] = 4.0
    with torch.no_grad():
        block.eval()(x)
        block(x, torch.randn(2, 6, 11, 10))
    head, *lines = deepops.explain(block.train()).split("\n")
    assert head == before
    assert lines == [
        "  float32 [2, 4, 11, 10] in training: deepops' convolution; timed 1.0000 ms (deepops), 2.0000 ms (torch)",
        "  float32 [2, 4, 11, 10] in evaluation: torch's convolution; timed 4.0000 ms (deepops), 2.0000 ms (torch)",
        "  float32 [2, 4, 11, 10] in evaluation with a residual: torch's convolution; "
        "timed 4.0000 ms (deepops), 2.0000 ms (torch)",
    ]
    with deepops.backends.flags(conv="aten"):
        assert deepops.explain(block).endswith("\n  but deepops.backends.conv is 'aten'")
    assert deepops.explain(make_block(4, 6, 3)).count("\n") == 0  # without padding it is another convolution
    assert _fused_conv.explain(nn.Conv1d(4, 6, 3)) == []


def test_evaluation_is_measured_apart(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    block, x = make_block(4, 6, 3), data()
    block(x)
    with torch.no_grad():
        block.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            block(x)
    modes = [(key.mode, key.dtype) for key in _conv_choice.measured()]
    assert modes == [("training", torch.float32), ("folded", torch.float32), ("evaluation", torch.bfloat16)]


def test_nothing_is_measured_while_a_graph_is_captured(
    timed_conv: dict[str, float], exact_conv: Exact, monkeypatch: pytest.MonkeyPatch
) -> None:
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    block, x = make_block(4, 6, 3), data()
    block(x)
    assert not exact_conv.calls
    with deepops.backends.flags(conv="fused"):
        block(x)
    assert len(exact_conv.calls) == 1
    capturing[0] = False
    block(x)
    count = len(exact_conv.calls)
    assert count > 2
    capturing[0] = True
    block(x)
    assert len(exact_conv.calls) == count + 1


def test_the_relu_family_is_one_kind(timed_conv: dict[str, float], exact_conv: Exact) -> None:
    for activation in ACTIVATIONS:
        ConvBNAct2d(4, 6, 3, activation=activation)(data())
    assert [key.smooth for key in _conv_choice.measured()] == [False, True]
