"""What is counted and promised of the GPU kernels of the LSTM ops, on the SIMT executor; and the values of the cell.

Values of ``lstm_sequence`` are tested on the same cases as the CPU kernels: test_lstm_op.py, fixture ``backend``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import lstm_cell_cases as cells
import pytest
import simt
import torch
from lstm_cases import DTYPES, VARIANTS, Case, LstmPools, backward, forward, make_case, op_results

from deepops.reference import lstm as formulas

pytestmark = pytest.mark.usefixtures("on_simt", "one_thread")

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
STEPS = 4


def launches(case: Case, *, save: bool = True, all_c: bool = False) -> tuple[list[simt.Launch], list[simt.Launch]]:
    """Of the forward and, if it saves, of the backward."""
    with simt.counting() as forwards:
        saved = forward(case, save=save, all_c=all_c)
    with simt.counting() as backwards:
        if save:
            backward(case, saved)
    return forwards.launches, backwards.launches


def names(launches: list[simt.Launch]) -> Counter[str]:
    return Counter(launch.name for launch in launches)


def scalars(launch: simt.Launch, case: Case) -> float:
    """Values moved by a launch for each unit of each sequence."""
    return (launch.load_bytes + launch.store_bytes) / (case.c0.numel() * case.c0.element_size())


# ---- launches -------------------------------------------------------------------------------------------------------

PLAIN = [name for name, options in VARIANTS.items() if not options.get("projection") and not options.get("layer_norm")]


@pytest.mark.parametrize("variant", PLAIN)
def test_one_launch_a_step(variant):
    """Beside the product. Around the loop: the first masked h, the gradient of h0, those of the small weights."""
    case = make_case(STEPS, 3, 16, **VARIANTS[variant])
    forwards, backwards = launches(case)
    masked = int(case.hidden_mask is not None or (case.lengths is not None and case.reverse))
    assert names(forwards) == Counter(lstm_forward=STEPS, lstm_state=masked)
    sums = int(case.weight_peephole is not None)
    assert names(backwards) == Counter(lstm_backward=STEPS, lstm_state=1, lstm_column_sums=sums)


def test_launches_with_layer_norm():
    forwards, backwards = launches(make_case(STEPS, 3, 16, layer_norm=True))
    assert names(forwards) == Counter(lstm_forward_norm=STEPS)
    assert names(backwards) == Counter(lstm_backward_norm=STEPS, lstm_state=1, lstm_column_sums=3)


def test_launches_with_a_projection():
    """One more a step where h is not just what the projection gives. Else for h_n, for its gradient and that of h0."""
    forwards, backwards = launches(make_case(STEPS, 3, 16, projection=True))
    assert names(forwards) == Counter(lstm_forward=STEPS, lstm_state=1)
    assert names(backwards) == Counter(lstm_backward=STEPS, lstm_state=2)
    for options, more in (({"zoneout_h": 0.5}, 0), ({"lengths": True}, 0), ({"hidden_dropout": 0.5}, 1)):
        forwards, backwards = launches(make_case(STEPS, 3, 16, projection=True, **options))
        assert names(forwards) == Counter(lstm_forward=STEPS, lstm_state=STEPS + more)
        assert names(backwards) == Counter(lstm_backward=STEPS, lstm_state=STEPS + 1)


def test_nothing_launches_nothing():
    for steps, batch in ((0, 3), (3, 0)):
        forwards, backwards = launches(make_case(steps, batch, 16, peephole=True, layer_norm=True))
        assert not forwards
        assert not backwards


def test_the_loop_allocates_nothing():
    """As many allocations for 40 steps as for 3: so a CUDA graph can capture it."""
    for options in ({}, {"projection": True, "zoneout_h": 0.1}, {"layer_norm": True, "hidden_dropout": 0.3}):
        counts = []
        for steps in (3, 40):
            case = make_case(steps, 3, 16, **options)
            saved = forward(case)
            calls: list[Callable[[], Any]] = [partial(forward, case), partial(backward, case, saved)]
            counts.append([allocations(call) for call in calls])
        assert counts[0] == counts[1], options
        assert min(counts[0]) > 0


def allocations(call: Callable[[], Any]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def test_a_cell_is_one_launch():
    case = cells.make_case(4, 12, 16, peephole=True)
    with simt.counting() as counted:
        packed = cells.pack(case)
    assert not counted.launches
    with simt.counting() as counted:
        gates = cells.forward(case, packed)[2]
    assert names(counted.launches) == Counter(lstm_forward=1)
    with simt.counting() as counted:
        cells.backward(case, packed, gates)
    assert names(counted.launches) == Counter(lstm_backward=1, lstm_column_sums=1)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def assert_packed(launch: simt.Launch, other: int = 0) -> None:
    """Nothing but 16-byte accesses, which touch no more sectors than they have to; ``other``: that are narrower."""
    narrow = sum(count for width, count in launch.lanes_of_width.items() if width != "16")
    assert narrow == other, launch
    assert launch.coalescing > 0.99, launch


@each_dtype
def test_bytes_of_a_step(dtype):
    """4 of gates_x, 4 of the product, c; 4 gates, c, h. Back: the gradient of h in two parts, 4 gates, c, its gradient;
    4 gradients of gates, that of c. The last step also leaves h_n and c_n, the first one of the backward has one part.
    """
    case = replace(make_case(STEPS, 8, 128, dtype), grad_c=None)
    forwards, backwards = launches(case)
    assert [scalars(launch, case) for launch in forwards] == [15, 15, 15, 17]
    assert [scalars(launch, case) for launch in backwards] == [13, 13, 13, 13, 2]
    for launch in (*forwards, *backwards):
        assert_packed(launch)
    forwards, _ = launches(case, save=False)
    assert [scalars(launch, case) for launch in forwards] == [11, 11, 11, 12]
    forwards, _ = launches(case, save=False, all_c=True)
    assert [scalars(launch, case) for launch in forwards] == [11, 11, 11, 13]


@each_dtype
def test_bytes_of_a_cell(dtype):
    """The products have summed up in what becomes the gates: 4 and c; 4, c, h."""
    case = cells.make_case(8, 32, 128, dtype, bias=False)
    packed = cells.pack(case)
    values = case.c.numel() * case.c.element_size()
    with simt.counting() as counted:
        gates = cells.forward(case, packed)[2]
    [launch] = counted.launches
    assert launch.load_bytes + launch.store_bytes == 11 * values
    assert_packed(launch)
    with simt.counting() as counted:
        cells.backward(case, packed, gates)
    [launch] = counted.launches  # grad_h, grad_c, 4 gates, c; 4 gradients, that of c
    assert launch.load_bytes + launch.store_bytes == 12 * values
    assert_packed(launch)


@each_dtype
def test_bytes_of_layer_norm(dtype):
    """What the row's sums need again stays in registers: the streams of a plain step, and the weights, 4 and 2.

    Back: r and the gradient of r, the weights, and six sums of wider type, read and written.
    """
    case = replace(make_case(STEPS, 8, 128, dtype, layer_norm=True), grad_c=None)
    forwards, backwards = launches(case)
    statistics = 4 / 128 * (8 if dtype == torch.float64 else 4) / case.c0.element_size()
    assert [scalars(launch, case) - statistics for launch in forwards] == [21, 21, 21, 23]
    wide = 1 if dtype in (torch.float32, torch.float64) else 2
    threads = 256
    for launch, sums in zip(backwards[:STEPS], (6, 12, 12, 12), strict=True):
        read = threads * statistics  # every thread reads the statistics of its row
        assert scalars(launch, case) - read == 13 + 8 + 6 + sums * wide
    for launch in forwards:
        assert_packed(launch, other=8 * 4)
    for launch in backwards[:STEPS]:
        assert_packed(launch, other=8 * 4 * threads)


def test_rows_that_are_no_packs_go_element_by_element():
    for layer_norm in (False, True):
        case = replace(make_case(STEPS, 8, 127, layer_norm=layer_norm), grad_c=None)
        forwards, backwards = launches(case)
        for launch in (*forwards, *backwards):
            assert {width for width, count in launch.lanes_of_width.items() if count} <= {"4", "8"}
            assert launch.coalescing > 0.79, launch  # 128 bytes that begin anywhere touch five sectors, not four


@pytest.mark.parametrize("variant", ["plain", "projection", "layer norm", "peephole", "hidden mask"])
def test_tensors_that_begin_anywhere(variant):
    """16-byte accesses are used where they are possible; without sums over a row the bits are the same."""
    case = make_case(3, 3, 24, torch.float64, **VARIANTS[variant])
    expected = op_results(case)
    pools = LstmPools()
    for name, value in vars(case).items():
        if not isinstance(value, torch.Tensor) or name in ("seed", "lengths"):
            continue
        storage = value.new_empty(value.numel() + 1)
        storage[1:] = value.flatten()
        moved = replace(case, **{name: storage[1:].view(value.shape)})
        pools.add(moved, f"{variant} {name}")
        if variant == "layer norm" or name in ("h0", "weight_hh", "weight_hr"):
            continue  # torch's products see where their inputs lie
        actual = op_results(moved)
        for key in ("h", "c", "grad_gates_x"):
            assert torch.equal(actual[key], expected[key]), (name, key)
    pools.check()


# ---- order ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "projection", "layer norm", "peephole", "lengths in reverse"])
def test_bits_do_not_depend_on_the_order(variant):
    """Of blocks and threads, and twice the same."""
    case = make_case(3, 5, 40, **VARIANTS[variant], zoneout_c=0.2)
    expected = op_results(case)
    for name, seed in (("in_order", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        with simt.schedule(name, seed):
            actual = op_results(case)
        for key, value in expected.items():
            assert torch.equal(actual[key], value), (name, key)


# ---- values ---------------------------------------------------------------------------------------------------------


def test_units_that_a_block_takes_in_turns():
    """Layer norm of rows with more units than a block has threads: in packs, and element by element."""
    pools = LstmPools()
    sizes = {torch.float32: (1032, 301), torch.float64: (520, 259), torch.float16: (2064, 259)}
    for i, (dtype, hiddens) in enumerate(sizes.items()):
        for j, hidden in enumerate(hiddens):
            peephole = (i + j) % 2 == 0
            case = make_case(3, 2, hidden, dtype, layer_norm=True, peephole=peephole, zoneout_h=0.2, zoneout_c=0.1)
            pools.add(case, f"{dtype} {hidden}")
    pools.check()


@each_dtype
@pytest.mark.parametrize("hidden", [3, 18, 24])
def test_masks_are_those_of_the_reference(hidden, dtype):
    """Bit for bit: a unit stays what it was where the mask says so, and elsewhere only by chance."""
    case = make_case(6, 5, hidden, dtype, zoneout_h=0.4, zoneout_c=0.7, first_step=3)
    assert case.seed is not None
    h, c, *_ = forward(case)
    for stream, p, states, first in ((0, 0.4, h, case.h0), (1, 0.7, c, case.c0)):
        before = torch.cat((first[None], states[:-1]))
        mask = torch.stack([formulas.random_mask(case.seed, stream, 3 + t, 5, hidden, p) for t in range(6)])
        assert torch.equal(states[mask], before[mask])
        assert (states == before)[~mask].double().mean() < (0.2 if dtype in (torch.float16, torch.bfloat16) else 1e-9)


@pytest.mark.parametrize("hidden", [3, 24])
def test_dropout_masks_are_those_of_the_reference(hidden):
    """What is dropped adds nothing: the cell is f * c, in fp64 exactly."""
    case = make_case(6, 5, hidden, torch.float64, recurrent_dropout=0.3, reverse=True)
    assert case.seed is not None
    _, c, _, _, gates, *_ = forward(case)
    before = torch.cat((c[1:], case.c0[None]))
    masks = [formulas.random_mask(case.seed, formulas.RECURRENT_DROPOUT, t, 5, hidden, 0.3) for t in range(6)]
    assert torch.equal(c == gates.chunk(4, 2)[1] * before, torch.stack(masks))


CELL_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "peephole": {"peephole": True},
    "clip": {"clip": True},
    "all": {"peephole": True, "clip": True},
}


@each_dtype
def test_values_of_the_cell(dtype):
    """In fp64, where stock has no worse errors than the oracle, as in ``LstmPools``."""
    pools = cells.CellPools()
    for (name, options), hidden in product(CELL_VARIANTS.items(), (1, 3, 16, 20, 127, 129)):
        for batch, inputs in ((1, 5), (3, 64), (8, 65), (13, 1), (26, 130)):
            case, text = cells.make_case(batch, inputs, hidden, dtype, **options), f"{name} {batch, inputs, hidden}"
            if dtype != torch.float64:
                pools.add(case, text)
                continue
            actual, oracle = cells.op_results(case), cells.differentiate(case)
            torch.testing.assert_close(actual, oracle, rtol=1e-10, atol=1e-10, msg=text)
    for pool in pools.pools.values():
        pool.check()


def test_cells_in_a_row_are_the_sequence():
    """The cell's kernels are those of the sequence; its sums are rounded once less."""
    case = make_case(5, 4, 20, torch.float64)
    h, c, *_ = forward(case)
    eye = torch.eye(80, dtype=torch.float64)
    packed = torch.ops.deepops_simt.lstm_pack(eye, case.weight_hh)
    state, cell = case.h0, case.c0
    for t in range(5):
        state, cell, _ = torch.ops.deepops_simt.lstm_cell(case.gates_x[t], state, cell, packed, None, None, None, False)
        torch.testing.assert_close(state, h[t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(cell, c[t], rtol=1e-12, atol=1e-12)


def test_what_the_cell_is_not_asked_for_is_empty():
    case = cells.make_case(4, 12, 20)
    packed = cells.pack(case)
    assert cells.forward(case, packed, save=False)[2].numel() == 0
    gates = cells.forward(case, packed)[2]
    full = cells.backward(case, packed, gates)
    for need_x, need_h in product((False, True), repeat=2):
        some = cells.backward(case, packed, gates, need_x=need_x, need_h=need_h)
        assert torch.equal(some[1], full[1]) if need_x else some[1].numel() == 0
        assert torch.equal(some[2], full[2]) if need_h else some[2].numel() == 0
        assert torch.equal(some[3], full[3])


@pytest.mark.parametrize(("batch", "inputs"), [(0, 4), (3, 0), (0, 0)])
def test_empty_cells(batch, inputs):
    case = cells.make_case(batch, 4, 5, peephole=True)
    case = replace(case, x=case.x[:, :inputs], weight_ih=case.weight_ih[:, :inputs].contiguous())
    h, c, gates = cells.forward(case, cells.pack(case))
    assert h.shape == c.shape == (batch, 5)
    gradients = cells.backward(case, cells.pack(case), gates)
    assert [tuple(g.shape) for g in gradients] == [(batch, 20), (batch, inputs), (batch, 5), (batch, 5), (15,)]
    if batch == 0:
        assert not gradients[4].any()


def test_bad_input():
    case = make_case(3, 2, 8)
    for name, change, message in (
        ("gates_x", torch.zeros(3, 2, 31), "gates_x has the wrong shape"),
        ("h0", torch.zeros(2, 7), "h0 has the wrong shape"),
        ("weight_peephole", torch.zeros(23), "weight_peephole has the wrong shape"),
        ("zoneout_c", 1.5, "zoneout_c must be between 0 and 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(replace(case, **{name: change}))
    cell = cells.make_case(3, 4, 8)
    packed = cells.pack(cell)
    for name, change, message in (
        ("x", torch.zeros(3, 5), "packed has the wrong shape"),
        ("h", torch.zeros(3, 7), "h has the wrong shape"),
        ("bias", torch.zeros(31), "bias has the wrong shape"),
    ):
        with pytest.raises(RuntimeError, match=message):
            cells.forward(replace(cell, **{name: change}), packed)


def test_lengths_beyond_the_steps_change_nothing():
    """On a GPU nobody reads them on the host: what is too long ends where the steps end, what is negative is empty."""
    for reverse in (False, True):
        case = make_case(4, 3, 16, reverse=reverse)
        expected = op_results(replace(case, lengths=torch.tensor([4, 0, 2])))
        actual = op_results(replace(case, lengths=torch.tensor([9, -3, 2])))
        for key, value in expected.items():
            if key != "grad_weight_hh":  # the test's own product, from these lengths
                assert torch.equal(actual[key], value), key
