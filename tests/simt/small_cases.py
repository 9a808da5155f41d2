"""All GPU kernels on small shapes, for the sanitized builds: ``python tests/simt/small_cases.py`` in their environment.

Values are compared with the CPU kernels, to see that something was computed; the sanitizer does the rest, and ends the
process. A Python with a sanitizer is slow: few cases, each of which reaches code that the others do not.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import adam_cases
import backends
import bn_cases

import deepops.functional  # loads the CPU ops

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
                        compare(case, training)
                        count += 1
    return count


def compare(case: bn_cases.Case, training: bool) -> None:
    backends.current = "cpu"
    expected = bn_cases.op_results(case, training)
    backends.current = "simt"
    actual = bn_cases.op_results(case, training)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(case.x.dtype, 5e-2)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


def adam() -> int:
    """Steps of tensors of one, of many and of no work items, aligned and askew, all dtypes in one launch."""
    options = adam_cases.OPTIONS[:4]
    results = []
    for cls in (adam_cases.Adam, adam_cases.SimtAdam):
        groups = []
        for dtype in adam_cases.DTYPES:
            for given in options:
                params = adam_cases.make([(3, 5), (0,), (2500,), ()], dtype)
                base = adam_cases.make([(1100,)], dtype)[0].detach()
                params.append(torch.nn.Parameter(base[3:]))
                groups.append({"params": params, **given})
        optimizer = cls(groups)
        params = [p for group in groups for p in group["params"]]
        adam_cases.train(optimizer, params, 3)
        results.append([*params, *(t for p in params for t in optimizer.state[p].values())])
    adam_cases.assert_same_bits(*results)
    return len(results[0])


def main() -> None:
    assert deepops.functional
    torch.manual_seed(0)
    torch.set_num_threads(1)
    adam_cases.attach_simt()
    for cases in (adam, batch_norm_act):
        print(f"{cases.__name__}: {cases()} cases", flush=True)
    print("clean", flush=True)
    os._exit(0)  # how libraries without a sanitizer tear themselves down is not what is tested


if __name__ == "__main__":
    main()
