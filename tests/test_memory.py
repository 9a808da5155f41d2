"""Memory of large results: taken from the pool, reused, never more than was in use at once, given back."""

from __future__ import annotations

import gc
import itertools
import os
import random
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import deepops
from deepops._library import has_kernel
from deepops.memory import empty_cache, stats
from deepops.nn import ConvBNReLU2d

pytestmark = [
    pytest.mark.skipif(not has_kernel("batch_norm_act_train", "cpu"), reason="no compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    gc.collect()
    empty_cache()
    yield
    empty_cache()


def result(mebibytes: float, fill: float = 1.0) -> Tensor:
    """A result of the kernel of so many MiB, all of whose elements are ``fill``."""
    x = torch.full((1, 1, int(mebibytes * MIB / 4)), fill)
    one = torch.ones(1)
    return deepops.functional.batch_norm_act(x, one - one, one, eps=0.0, activation="identity")


def test_small_results_are_torchs() -> None:
    before = stats()
    small = result(0.9)
    assert stats() == before
    large = result(1)
    assert stats().live == before.live + large.nbytes
    assert stats().mapped == before.mapped + 1
    assert small.untyped_storage().resizable()


def test_the_next_result_takes_the_memory_of_a_freed_one() -> None:
    before = stats()
    first = result(3)
    address = first.data_ptr()
    del first
    assert stats().live == before.live
    assert stats().kept >= 3 * MIB
    second = result(2.9)  # nearly as large
    assert second.data_ptr() == address
    assert stats().mapped == before.mapped + 1
    assert stats().kept == 0


def test_results_share_no_memory_while_they_exist() -> None:
    results = [result(1 + i / 4, float(i)) for i in range(8)]
    del results[2:6:2]
    results += [result(1 + i / 4, 10.0 + i) for i in range(8)]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in results)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for t in results:
        assert (t == t.flatten()[0]).all()
        assert t.data_ptr() % 64 == 0


def test_never_more_than_was_in_use_at_once() -> None:
    draw = random.Random(0)
    held: list[Tensor] = []
    most = start = stats().live
    for _ in range(300):
        if held and draw.random() < 0.5:
            held.pop(draw.randrange(len(held)))
        else:
            held.append(result(draw.choice([1, 1.1, 1.5, 2, 3, 5])))
        now = stats()
        most = max(most, now.live)
        assert now.live + now.kept <= most
    held.clear()
    assert stats().live == start
    empty_cache()
    assert stats().kept == 0


def test_after_emptying_the_limit_starts_anew() -> None:
    large = result(16)
    del large
    empty_cache()
    for _ in range(8):
        parts = [result(1), result(2)]
        del parts
    assert stats().kept <= 4 * MIB


def test_a_training_step_maps_nothing_after_the_first() -> None:
    model = nn.Sequential(ConvBNReLU2d(3, 32, 3, padding=1), ConvBNReLU2d(32, 64, 3, padding=1))
    x = torch.randn(8, 3, 32, 32)

    def step() -> None:
        model(x).sum().backward()

    step()
    mapped = stats().mapped
    for _ in range(3):
        step()
    assert stats().mapped == mapped
    assert mapped > 0


def test_results_are_made_and_freed_on_many_threads() -> None:
    before, errors = stats().live, []
    boxes: list[list[Tensor]] = [[] for _ in range(4)]

    def work(own: int) -> None:
        draw = random.Random(own)
        try:
            with torch.no_grad():
                for turn in range(50):
                    boxes[own].append(result(draw.choice([1, 2]), own * 100.0 + turn))
                    box = draw.choice(boxes)  # freed by another thread than made it
                    value = box.pop() if box else None
                    assert value is None or bool((value == value.flatten()[0]).all())
        except Exception as error:  # reported by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    boxes.clear()
    gc.collect()
    assert stats().live == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_has_its_own() -> None:
    kept = result(2, 3.0)
    freed = result(2)
    del freed
    child = os.fork()
    if child == 0:  # no assert, no pytest in here
        mine = result(2, 5.0)
        os._exit(0 if bool((kept == 3).all() and (mine == 5).all()) else 1)
    assert os.waitpid(child, 0)[1] == 0
    mine = result(2, 7.0)
    assert (kept == 3).all()
    assert (mine == 7).all()


def test_a_result_outlives_the_emptying_of_the_pool() -> None:
    y = result(2, 4.0)
    empty_cache()
    assert (y == 4).all()
    assert torch.equal(y.clone(), y)
