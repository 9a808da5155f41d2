"""The division of many tensors into work items (csrc/optim/plan.h), alone: no tensors, no threads."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepops._library import _C

pytestmark = pytest.mark.skipif(_C is None, reason="the module _C was not built")

CHUNK = 256


def stretches(sizes, chunk=CHUNK):
    plan = _C.ChunkPlan(sizes, chunk)
    return plan, plan.stretches(0, plan.items)


def assert_exact_cover(sizes, found, chunk):
    """Every element of every tensor once, in order, in stretches that are neither empty nor too long."""
    reached = [0] * len(sizes)
    last = (0, 0)
    for item, tensor, begin, end in found:
        assert begin == reached[tensor], "a gap, an overlap or a step back"
        assert 0 < end - begin <= chunk
        assert begin % 64 == 0, "a tensor is split where a cache line is"
        assert (item, tensor) >= last
        reached[tensor], last = end, (item, tensor)
    assert reached == sizes


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0],
        [1],
        [CHUNK - 1],
        [CHUNK],
        [CHUNK + 1],
        [0, 0, 5],
        [5, 0, 0],
        [0, 1, 0, CHUNK + 1, 0],
        [3 * CHUNK, 1, 1, 1, 2 * CHUNK - 1],
    ],
)
def test_every_element_once_and_in_order(sizes):
    assert_exact_cover(sizes, stretches(sizes)[1], CHUNK)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=40), st.integers(1, 1000))
def test_every_element_once_and_in_order_property(sizes, chunk):
    plan, found = stretches(sizes, chunk)
    assert plan.chunk >= chunk
    assert_exact_cover(sizes, found, plan.chunk)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3000), max_size=40), st.data())
def test_the_order_of_asking_does_not_matter(sizes, data):
    """Threads ask for ranges of items; the stretches of a range are the same, whatever the ranges."""
    plan, found = stretches(sizes)
    cut = data.draw(st.integers(0, plan.items))
    assert plan.stretches(0, cut) + plan.stretches(cut, plan.items) == found


def test_empty_tensors_take_no_item():
    assert _C.ChunkPlan([0] * 1000, CHUNK).items == 0


def test_many_tiny_tensors_share_items_but_not_too_many():
    plan, found = stretches([1] * 21_000, 8192)
    assert_exact_cover([1] * 21_000, found, 8192)
    per_item = [0] * plan.items
    for item, *_ in found:
        per_item[item] += 1
    assert max(per_item) <= 8192 // 64, "visiting a tensor costs about as much as 64 elements"
    assert min(per_item[:-1]) > 1, "a work item is never tiny"


def test_items_are_of_equal_size():
    plan, found = stretches([10 * CHUNK], CHUNK)
    sizes = [end - begin for _, _, begin, end in found]
    assert sizes == [CHUNK] * 10
    assert plan.items == 11  # the padding after the tensor


def test_beyond_two_to_the_31_elements():
    sizes = [5, 2**31 + 1, 0, 2**33 + 3]
    plan = _C.ChunkPlan(sizes, 2**20)
    middle = plan.stretches(2**11, 2**11 + 2)
    assert all(tensor == 1 and end > begin > 2**30 for _, tensor, begin, end in middle[:1])
    last = plan.stretches(plan.items - 2, plan.items)
    assert last[-1][1:] == (3, last[-1][2], 2**33 + 3)
    assert_exact_cover(sizes, plan.stretches(0, plan.items), 2**20)


@pytest.mark.parametrize(
    ("sizes", "strides", "dense"),
    [
        ((), (), True),
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((2, 3, 4, 5), (60, 1, 15, 3), True),  # channels_last
        ((3, 1, 4), (4, 99, 1), True),
        ((3, 4), (8, 1), False),  # gaps
        ((3, 4), (0, 1), False),  # expanded
        ((3, 4), (2, 1), False),  # overlapping
        ((0, 4), (7, 7), True),
    ],
)
def test_is_dense(sizes, strides, dense):
    assert _C.is_dense(sizes, strides) is dense
