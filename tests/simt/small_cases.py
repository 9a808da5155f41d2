"""All GPU kernels on small shapes, for the sanitized builds: ``python tests/simt/small_cases.py`` in their environment.

Values are compared with the CPU kernels, to see that something was computed; the sanitizer does the rest, and ends the
process. A Python with a sanitizer is slow: few cases, each of which reaches code that the others do not.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import backends
import bn_cases
import bn_sync
import conv_cases
import conv_gemm
import conv_tile_cases
import depthwise_cases
import fused_conv_cases
import lstm_cases
import lstm_cell_cases
import optim_cases
import step_cases
from step_cases import BF16, F16, F32, F64

import deepops.functional  # loads the CPU ops
import simt
from deepops import _conv_problem

LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Whole packs; tails everywhere; planes smaller than a pack; several blocks to a channel.
SHAPES = [(2, 8, 4, 8), (3, 5, 7, 7), (4, 3, 1, 2), (2, 2, 40, 41)]
FEW = ["relu", "gelu"]


def batch_norm_act() -> int:
    """Training and evaluation, forward and backward."""
    count = 0
    for shape in SHAPES:
        for layout in LAYOUTS:
            for dtype in bn_cases.DTYPES if shape in SHAPES[:2] else bn_cases.DTYPES[:1]:
                for activation in bn_cases.ACTIVATIONS if shape == SHAPES[1] and dtype == torch.float32 else FEW:
                    for training in (True, False):
                        case = bn_cases.make_case(
                            shape, dtype, layout, activation=activation, residual=count % 2 == 1, training=training
                        )
                        compare(case, lambda case=case, training=training: bn_cases.op_results(case, training))
                        count += 1
    return count


def batch_in_parts() -> int:
    """The ops between which processes talk, for parts of which one is empty; more channels than a block has threads."""
    count = 0
    for shape in [*SHAPES, (3, 300, 1, 2)]:
        for layout in LAYOUTS:
            for dtype in bn_cases.DTYPES:
                case = bn_cases.make_case(shape, dtype, layout, activation="silu", residual=count % 2 == 1)
                sizes = (1, 0, shape[0] - 1)
                compare(case, lambda case=case, sizes=sizes: bn_sync.join(case, bn_sync.results_of_parts(case, sizes)))
                count += 1
    return count


def on_chip() -> int:
    """The training passes in one launch each way, with one and with several blocks to a channel."""
    count = 0
    with simt.device(multiprocessors=3):
        for shape in [(3, 5, 7, 7), (2, 2, 80, 81), (40, 9, 2, 2)]:
            for layout in LAYOUTS:
                for dtype in bn_cases.DTYPES if shape == (3, 5, 7, 7) else bn_cases.DTYPES[:1]:
                    case = bn_cases.make_case(
                        shape, dtype, layout, activation="silu", residual=count % 2 == 1, momentum=None
                    )
                    compare(case, lambda case=case: bn_cases.op_results(case, True))
                    count += 1
    return count


def compare(case: bn_cases.Case, run: Callable[[], dict[str, torch.Tensor]]) -> None:
    backends.current = "cpu"
    expected = run()
    backends.current = "simt"
    actual = run()
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(case.x.dtype, 5e-2)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def depthwise_bn_act() -> int:
    """Whole and broken warps of channels, taps in the padding, outputs that no input has."""
    geometries: list[dict[str, Any]] = [{}, {"stride": (2, 3)}, {"filter_size": (2, 3), "dilation": (2, 1)}]
    for channels, dtype, geometry in product((16, 33), (F32, F64), geometries):
        case = depthwise_cases.make_case((2, channels, 6, 7), dtype=dtype, activation="silu", **geometry)
        compare(case, lambda case=case: depthwise_cases.op_results(case))
    return 12


# Of threads, blocks and the landing of copies.
ORDERS = (("in_order", 0), ("reverse", 0), ("random", 1))


def convolutions() -> int:
    """Whole packs of channels and tails in every order; several groups of tiles; a filter in steps."""
    more: list[dict[str, Any]] = [
        {"image": (2, 9, 18), "out_channels": 5, "stride": (2, 3), "residual": True},
        {"image": (1, 9, 18), "out_channels": 40, "dilation": (2, 1), "momentum": None, "residual": True},
    ]
    small = [
        conv_tile_cases.make_case(channels=channels, dtype=dtype, integers=True, activation="relu", **options)
        for (channels, dtype), options in product(((1, F32), (3, F16), (4, BF16)), more)
    ]
    for case, order in product(small, ORDERS):
        with simt.schedule(*order):
            compare_convolution(case)
    bare = {"filter_size": (1, 1), "padding": (0, 0, 0, 0)}
    large = [
        conv_tile_cases.make_case((1, 68, 130), 1, 1, F16, integers=True, **bare),
        conv_tile_cases.make_case((1, 3, 17), 3, 8, F32, integers=True, filter_size=(9, 9), padding=(4,) * 4),
    ]
    for case in large:
        compare_convolution(case)
    return len(small) * len(ORDERS) + len(large)


def tensor_core_convolutions() -> int:
    """Every tile, its last one incomplete, in every order: more pieces of depth than shared memory holds, and fewer."""
    count = 0
    for forced, order in product(conv_gemm.FORCED, ORDERS):
        for geometry, channels, dtype in (("3x3", 24, F16), ("1x1", 40, BF16)):
            options = {"channels": channels, "out_channels": forced.out_channels[1], "dtype": dtype}
            case = forced.case(geometry, integers=True, activation="relu", residual=dtype == F16, **options)
            with simt.device(forced.multiprocessors), simt.schedule(*order):
                compare_convolution(case)
            count += 1
    return count


def convolution_modules() -> int:
    """A block's step and its evaluation, by either kernel: beside torch's convolution."""
    count = 0
    _conv_problem.executor = torch.ops.deepops_simt
    for (channels, dtype), order in product(((3, F32), (3, BF16), (8, BF16)), ORDERS):
        block = conv_cases.make_block(channels, 10, 3, stride=(2, 1), padding=1, activation="silu")
        block = block.to(memory_format=torch.channels_last)
        x = fused_conv_cases.data(2, channels)
        autocast = {} if dtype == F32 else {"dtype": dtype}
        tolerance = 1e-4 if dtype == F32 else 5e-2
        results = []
        for way in ("aten", "fused"):
            with deepops.backends.flags(conv=way), simt.schedule(*order):  # "fused" raises where it does not apply
                done = fused_conv_cases.step(block, x, None, **autocast)
                with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != F32):
                    done["evaluation"] = copy.deepcopy(block).eval()(x)
            results.append(done)
        for name, expected in results[0].items():
            if expected is not None:
                torch.testing.assert_close(results[1][name], expected, rtol=tolerance, atol=tolerance, msg=name)
        count += 1
    _conv_problem.executor = None
    return count


def compare_convolution(case: conv_tile_cases.Case) -> None:
    backends.current = "simt"
    actual, expected = conv_tile_cases.op_results(case), conv_tile_cases.oracle_results(case)
    for name in ("y", "z"):
        torch.testing.assert_close(actual[name], expected[name].to(case.x.dtype), rtol=0, atol=0, msg=name)
    for name in ("mean", "invstd", "running_mean", "running_var"):
        torch.testing.assert_close(actual[name], expected[name].float(), rtol=1e-2, atol=1e-2, msg=name)


def lstm() -> int:
    """Every option, whole packs and none, layer norm of more units than a block has threads; cells."""
    count = 0
    for (_, options), (dtype, hidden) in product(lstm_cases.VARIANTS.items(), ((F32, 8), (F64, 3), (F16, 16))):
        compare_lstm(lstm_cases.make_case(3, 3, hidden, dtype, **options), lstm_cases.op_results)
        count += 1
    for options in ({"layer_norm": True, "projection": True, "peephole": True}, {"projection": True, "lengths": True}):
        for hidden in (12, 259):
            case = lstm_cases.make_case(2, 2, hidden, zoneout_h=0.3, hidden_dropout=0.2, **options)
            compare_lstm(case, lstm_cases.op_results)
            count += 1
    for dtype, hidden in product((F32, BF16), (3, 16)):
        compare_lstm(lstm_cell_cases.make_case(3, 5, hidden, dtype, peephole=True), lstm_cell_cases.op_results)
        count += 1
    return count


def compare_lstm(case: Any, run: Callable[[Any], dict[str, torch.Tensor]]) -> None:
    def typed(case: Any) -> Any:  # in 16-bit cases gates_x has another type on the CPU
        if not isinstance(case, lstm_cases.Case):
            return case
        return replace(case, gates_x=case.gates_x.to(lstm_cases.gates_dtype(case.h0.dtype)))

    backends.current = "cpu"
    expected = run(typed(case))
    backends.current = "simt"
    actual = run(typed(case))
    tolerance = {F64: 1e-9, F32: 1e-3}.get(next(iter(expected.values())).dtype, 1e-1)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def adam() -> int:
    """Steps of tensors of one, of many and of no work items, aligned and askew, all dtypes in one launch."""
    options = optim_cases.OPTIONS[:4]
    results = []
    for cls in (optim_cases.Adam, optim_cases.SimtAdam):
        groups = []
        for dtype in optim_cases.DTYPES:
            for given in options:
                params = optim_cases.make([(3, 5), (0,), (2500,), ()], dtype)
                base = optim_cases.make([(1100,)], dtype)[0].detach()
                params.append(torch.nn.Parameter(base[3:]))
                groups.append({"params": params, **given})
        optimizer = cls(groups)
        params = [p for group in groups for p in group["params"]]
        optim_cases.train(optimizer, params, 3)
        results.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    optim_cases.assert_same_bits(*results)
    return len(results[0])


def optimizers() -> int:
    """A clipped step of every rule, set of states and dtype; one that tells facts of all rows; a skipped one."""
    kinds = [{"dtype": dtype} for dtype in step_cases.DTYPES]
    kinds += [{"dtype": F16, "state_dtype": F32, "master": "full"}, {"dtype": BF16, "master": "low_half", "offset": 1}]
    kinds += [{"dtype": F32, "state_dtype": BF16, "odd": 1}]
    count = 0
    for rule, hyper in step_cases.HYPER.items():
        shapes = [(2500,), (0,), (70,)]
        specs = [
            step_cases.Spec(shape, group=(shape[0] + k) % len(hyper), **kind)
            for shape in shapes
            for k, kind in enumerate(kinds)
        ]
        results = []
        for backend in ("cpu", "simt"):
            rows = step_cases.Rows(backend, rule, specs, hyper, seed=1)
            rows.give_grads()
            norm = rows.norm(rows=True)
            assert norm.non_finite == 0
            rows.step(step_cases.Options(norm=norm.raw, max_norm=1e9, skip_non_finite=True))
            rows.step(step_cases.Options(facts=True, write_grads=True))
            rows.step(step_cases.Options(facts=True, found_inf=torch.tensor(1.0)))
            results.append((rows.everything(), rows.facts))
        step_cases.assert_same_bits(results[0][0], results[1][0])
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-12, atol=0)
        count += len(specs)
    return count


def clip() -> int:
    """Of gradients of all dtypes, which the norm asks for."""
    from deepops._library import _C

    grads = [torch.ones(count + 1, dtype=dtype)[1:] for dtype in step_cases.DTYPES for count in (3, 0, 1100)]
    norm = torch.zeros(3, dtype=F64)
    listed = _C.GradList("simt", torch.Tensor, grads)
    listed.norm(norm.data_ptr())
    listed.clip(norm.data_ptr(), 1.0)
    listed.norm(norm.data_ptr())
    assert abs(float(norm.view(F32)[4]) - 1) < 0.01
    return len(grads)


def main() -> None:
    assert deepops.functional
    torch.manual_seed(0)
    torch.set_num_threads(1)
    optim_cases.attach_simt()
    for cases in (
        adam,
        optimizers,
        clip,
        batch_norm_act,
        on_chip,
        batch_in_parts,
        depthwise_bn_act,
        convolutions,
        tensor_core_convolutions,
        convolution_modules,
        lstm,
    ):
        print(f"{cases.__name__}: {cases()} cases", flush=True)
    print("clean", flush=True)
    os._exit(0)  # how libraries without a sanitizer tear themselves down is not what is tested


if __name__ == "__main__":
    main()
