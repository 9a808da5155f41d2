"""The optimizers' GPU kernels on the SIMT executor: the CPU kernels' bits, and what is counted and promised."""

import itertools

import pytest
import simt
import torch
from step_cases import (
    BF16,
    DTYPES,
    EACH,
    F16,
    F32,
    F64,
    HYPER,
    MOST_STATES,
    Options,
    Rows,
    Spec,
    adam,
    assert_same_bits,
    mixed_dtypes,
    rmsprop,
    sgd,
    states_of,
)

from deepops._library import _C, has_kernel

pytestmark = pytest.mark.skipif(not has_kernel("adam", "cpu"), reason="the kernels were not built")

# Whole packs, tails, less than a pack, nothing, several work items.
SHAPES = [(), (1,), (3, 5), (0,), (63,), (64,), (65,), (1024,), (2, 0, 3), (2500,)]
MIXED = list(mixed_dtypes())
BACKENDS = ("cpu", "simt")
each_rule = pytest.mark.parametrize(("rule", "hyper"), MOST_STATES, ids=[rule for rule, _ in MOST_STATES])
FACTS_TOLERANCE = 1e-12  # sums in double, in another order


@pytest.fixture(autouse=True)
def _attached(on_simt):
    _C.attach(simt.load()._name, "simt")


def specs_of(shapes=SHAPES, **kwargs):
    return [Spec(shape, **kwargs) for shape in shapes]


def both(rule, specs, hyper, **kwargs):
    return [Rows(backend, rule, specs, hyper, **kwargs) for backend in BACKENDS]


def assert_same_steps(rule, specs, hyper, steps=3, without=(), options=lambda rows, step: Options(), **kwargs):
    """Steps on the CPU and on the GPU kernel leave the same bits everywhere; returns both rows."""
    runs = both(rule, specs, hyper, **kwargs)
    for step in range(steps):
        for rows in runs:
            rows.give_grads(step, without[step] if step < len(without) else ())
            rows.step(options(rows, step))
        assert_same_bits(*(rows.everything() for rows in runs))
    return runs


# ---- the same bits as the CPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rule", "hyper"), EACH, ids=str)
def test_bits_of_the_cpu_kernel(rule, hyper, dtype):
    """From the first step on, with gradients that are missing now and then."""
    assert_same_steps(rule, specs_of(dtype=dtype, step=0.0), [hyper], without=[(), (0, 3, 9), (4,)])


@pytest.mark.parametrize("rule", HYPER)
def test_all_dtypes_and_groups_together(rule):
    specs = [
        Spec(shape, dtype, group=group)
        for shape, (group, dtype) in itertools.product(
            [(5,), (0,), (1500,)], itertools.product(range(len(HYPER[rule])), DTYPES)
        )
    ]
    assert_same_steps(rule, specs, HYPER[rule])


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(v).removeprefix("torch.") for v in d.values()))
@pytest.mark.parametrize(("rule", "hyper"), EACH, ids=str)
def test_mixed_dtypes(rule, hyper, dtypes):
    """Every combination of dtypes, master weights and rounding; gradients written back or not."""
    for seed, write_grads in ((None, False), (3, False), ((1 << 40) + 5, True)):
        assert_same_steps(
            rule,
            specs_of([(), (7,), (64,), (0,), (1300,)], **dtypes),
            [hyper],
            steps=2,
            seed=seed,
            options=lambda rows, step, write=write_grads: Options(write_grads=write, grad_scale=torch.tensor(3.0)),
        )


@each_rule
def test_uniform_and_mixed_rows_together(rule, hyper):
    """Two launches, each of which takes its own rows; empty ones too."""
    kinds = [{}, {"dtype": BF16, "state_dtype": F32}, {"dtype": F16, "master": "full"}, {"dtype": F64}]
    specs = [Spec(shape, **kind) for shape, kind in itertools.product([(40,), (0,), (1400,)], kinds)]
    _, rows = assert_same_steps(rule, specs, [hyper])
    with simt.counting() as counted:
        rows.give_grads()
        rows.step()
    assert [launch.name for launch in counted.kernels] == [rule, f"{rule} mixed"]


@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(rule, hyper, dtype):
    """Streams that begin at any place modulo 16, together and each for itself, in tensors of one and of many items."""
    size = torch.empty((), dtype=dtype).element_size()
    specs = [
        Spec((count,), dtype, offset=offset, odd=odd)
        for count, offset, odd in itertools.product((3, 40, 2500), range(0, 16 // size, 3), (None, 0, 1, 3, 4, 5))
    ]
    assert_same_steps(rule, specs, [hyper], steps=1)


@each_rule
@pytest.mark.parametrize("dtypes", MIXED, ids=lambda d: "-".join(str(v).removeprefix("torch.") for v in d.values()))
def test_any_alignment_of_mixed_streams(rule, hyper, dtypes):
    specs = [
        Spec((count,), offset=offset, odd=odd, **dtypes)
        for count, offset, odd in itertools.product((3, 1100), range(8), (None, 0, 1, 2, 5))
    ]
    assert_same_steps(rule, specs, [hyper], steps=1, seed=1, options=lambda rows, step: Options(write_grads=True))


@each_rule
@pytest.mark.parametrize("schedule", [("reverse", 0), ("random", 1), ("random", 2)], ids=str)
def test_any_order_of_blocks_and_threads(rule, hyper, schedule):
    specs = specs_of([(700,), (3, 7), (0,), (5000,)], dtype=F16)
    specs += specs_of([(700,), (3, 7), (0,), (5000,)], dtype=BF16, state_dtype=F32, master="low_half")
    with simt.schedule(*schedule):
        assert_same_steps(rule, specs, [hyper])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e-40, 3e38, -0.0])
@pytest.mark.parametrize("kind", [{}, {"master": "low_half"}, {"master": "full"}, {"state_dtype": F32}], ids=str)
@each_rule
def test_bits_of_special_numbers(rule, hyper, kind, value):
    runs = both(rule, specs_of([(300,)], dtype=BF16, **kind), [hyper], seed=2)
    for rows in runs:
        rows.give_grads()
        rows.grads[0][::3] = value
        rows.params[0].data[::7] = value
        rows.step()
    assert_same_bits(*(rows.everything() for rows in runs))


def test_random_numbers_depend_on_the_place_alone():
    """A tensor of many work items, and the same one with another tensor before it: the same rounding."""
    alone, after = (
        Rows("simt", "adam", specs_of(shapes, dtype=BF16), [adam()], seed=7)
        for shapes in ([(5000,)], [(5000,), (777,)])
    )
    for rows in (alone, after):
        rows.give_grads()
        rows.step()
    assert torch.equal(alone.params[0], after.params[0])
    plain = Rows("simt", "adam", specs_of([(5000,)], dtype=BF16), [adam()])
    plain.give_grads()
    plain.step()
    assert not torch.equal(alone.params[0], plain.params[0])


# ---- scaling --------------------------------------------------------------------------------------------------------

SCALED = [{}, {"dtype": BF16}, {"dtype": BF16, "state_dtype": F32, "master": "full"}, {"dtype": F64}]


@each_rule
@pytest.mark.parametrize("facts", [False, True])
@pytest.mark.parametrize("start", [0.0, 4.0], ids=["first step", "later"])
def test_a_skipped_step_changes_nothing(rule, hyper, facts, start):
    """By found_inf and by what the norm has found; the steps around it are taken."""
    specs = [Spec(shape, step=start, **kind) for shape, kind in itertools.product([(40,), (0,), (2100,)], SCALED)]
    for use_norm in (False, True):
        runs = both(rule, specs, [hyper], seed=1)
        for rows in runs:
            for step, bad in enumerate((True, True, False, True, False)):
                rows.give_grads(step)
                if bad:
                    rows.grads[-4][2000] = float("inf")
                before = rows.everything()
                options = Options(facts=facts, write_grads=facts)
                if use_norm:
                    options.norm, options.skip_non_finite = rows.norm().raw, True
                else:
                    options.found_inf = torch.tensor(float(bad))
                rows.step(options)
                after = rows.everything()
                if bad:
                    assert_same_bits(before, after)
                else:
                    assert not torch.equal(before[-1], after[-1])
                if facts:
                    assert rows.facts[:, 1].sum() == bad
                    assert (rows.facts[:, 2:] == 0).all() == bad
        assert_same_bits(*(rows.everything() for rows in runs))
        if facts:
            torch.testing.assert_close(runs[0].facts, runs[1].facts, rtol=FACTS_TOLERANCE, atol=0, equal_nan=True)


@each_rule
@pytest.mark.parametrize("kind", SCALED, ids=str)
def test_a_scale_of_a_power_of_two_changes_no_bit(rule, hyper, kind):
    plain = Rows("simt", rule, specs_of([(40,), (2100,)], **kind), [hyper])
    scaled = Rows("simt", rule, specs_of([(40,), (2100,)], **kind), [hyper], scale=1024.0)
    for step in range(3):
        plain.give_grads(step)
        plain.step()
        scaled.give_grads(step)
        scaled.step(Options(grad_scale=torch.tensor(1024.0)))
    for rows in (plain, scaled):
        for grad in rows.grads:
            grad.zero_()
    assert_same_bits(plain.everything(), scaled.everything())


@each_rule
@pytest.mark.parametrize("kind", SCALED, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping(rule, hyper, kind, max_norm):
    """With one norm the bits are the CPU's; with its own the parameters are within an ulp of them after a step."""
    scale = torch.tensor(100.0)
    runs = both(rule, specs_of([(40,), (2100,)], **kind), [hyper], scale=100.0)
    own = Rows("simt", rule, runs[0].specs, [hyper], scale=100.0)
    for rows in (*runs, own):
        rows.give_grads()
    norm = runs[0].norm(scale).raw
    for rows in (*runs, own):
        mine = norm if rows is not own else own.norm(scale).raw
        rows.step(Options(grad_scale=scale, norm=mine, max_norm=max_norm))
    assert_same_bits(*(rows.everything() for rows in runs))
    for p, q in zip(runs[0].params, own.params, strict=True):
        ulp = torch.finfo(p.dtype).eps
        # In fp64 the factor has the error of the sums, in the step's part of a parameter, which is far below 1.
        torch.testing.assert_close(p, q, rtol=ulp, atol=ulp if p.dtype == F64 else 0)


def test_clipping_takes_effect():
    """With plain SGD and a rate of 1 the parameters move by max_norm in all."""
    rows = Rows("simt", "sgd", specs_of([(40,), (2100,)]), [sgd(lr=1.0)])
    rows.give_grads()
    before = torch.cat([p.detach().clone() for p in rows.params])
    rows.step(Options(norm=rows.norm().raw, max_norm=0.5))
    moved = torch.cat([p.detach() for p in rows.params]) - before
    assert abs(moved.double().norm() - 0.5) < 1e-4


@each_rule
@pytest.mark.parametrize("kind", SCALED, ids=str)
def test_gradients_are_left_as_they_were_used(rule, hyper, kind):
    runs = assert_same_steps(
        rule,
        specs_of([(40,), (2100,)], **kind),
        [hyper],
        scale=8.0,
        options=lambda rows, step: Options(grad_scale=torch.tensor(8.0), write_grads=True),
    )
    plain = Rows("simt", rule, runs[1].specs, [hyper])
    plain.give_grads(2)
    assert_same_bits(runs[1].grads, plain.grads)


# ---- facts and norm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "hyper"), [*MOST_STATES, ("adam", adam(eps=0.0)), ("rmsprop", rmsprop(eps=0.0))], ids=str
)
@pytest.mark.parametrize("kind", [*SCALED, {"dtype": F16}, {"dtype": BF16, "master": "low_half"}], ids=str)
def test_facts(rule, hyper, kind):
    """The CPU's numbers, with the CPU's bits in everything else; rows without a gradient or elements have zeros."""
    specs = specs_of([(), (40,), (0,), (9000,), (2100,), (33,)], **kind)
    runs = assert_same_steps(
        rule, specs, [hyper], without=[(), (1, 3), ()], options=lambda rows, step: Options(facts=True)
    )
    torch.testing.assert_close(runs[0].facts, runs[1].facts, rtol=FACTS_TOLERANCE, atol=0)
    assert (runs[1].facts[2] == 0).all()
    for rows in runs:
        rows.give_grads(3, without=(1, 3))
        rows.step(Options(facts=True))
        assert (rows.facts[1] == 0).all()
        assert (rows.facts[3] == 0).all()
    grads = [g.double().square().sum() for g in runs[1].grads]
    torch.testing.assert_close(runs[1].facts[[0, 4, 5], 0], torch.stack([grads[i] for i in (0, 4, 5)]))


def test_facts_and_norm_do_not_depend_on_the_order_of_blocks():
    def run():
        rows = Rows("simt", "adam", specs_of([(9000,), (40,), (3000,)], dtype=BF16), [adam()])
        rows.give_grads()
        norm = rows.norm(rows=True)
        rows.step(Options(facts=True))
        return [rows.facts, norm.raw, norm.rows]

    expected = run()
    for schedule in (("reverse", 0), ("random", 1), ("random", 2)):
        with simt.schedule(*schedule):
            assert_same_bits(expected, run())


@pytest.mark.parametrize("rows_too", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(dtype, rows_too):
    specs = [
        Spec(shape, dtype, offset=offset) for offset, shape in enumerate([(), (7,), (0,), (64,), (9000,), (2500,)])
    ]
    scale = torch.tensor(16.0)
    runs = both("sgd", specs, [sgd()], scale=3.0)
    for without, bad in (((), ()), ((4,), ()), ((), (4, 1)), ((), ())):
        found = []
        for rows in runs:
            rows.give_grads(1, without)
            for index in bad:
                rows.grads[index][3] = float("nan") if index == 1 else float("-inf")
            found.append(rows.norm(scale, rows_too))
        cpu, gpu = found
        torch.testing.assert_close(gpu.raw[:2], cpu.raw[:2], rtol=FACTS_TOLERANCE, atol=0, equal_nan=True)
        assert gpu.non_finite == len(bad)
        assert gpu.found_inf == bool(bad)
        torch.testing.assert_close(gpu.norm, cpu.norm, rtol=2e-7, atol=0, equal_nan=True)
        torch.testing.assert_close(gpu.rows, cpu.rows, rtol=FACTS_TOLERANCE, atol=0, equal_nan=True)
        exact = sum(g.double().square().sum() for i, g in enumerate(rows.grads) if i not in without)
        if not bad:
            assert abs(gpu.squares - exact) <= FACTS_TOLERANCE * exact


def test_norm_without_any_gradient():
    rows = Rows("simt", "sgd", specs_of([(5,), (0,)]), [sgd()])
    rows.give_grads(without=(0, 1))
    found = rows.norm(rows=True)
    assert (found.squares, found.non_finite, found.norm, found.found_inf) == (0, 0, 0, 0)
    assert (found.rows == 0).all()


def grad_lists(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    shapes = [(40,), (0,), (9000,), (33,)]
    grads = [(scale * torch.randn((*shape[:-1], shape[-1] + 3), generator=generator)).to(dtype)[3:] for shape in shapes]
    return grads, [g.clone() for g in grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_of_a_list(dtype, max_norm):
    """The CPU's bits where the norm is the same; nothing is written where nothing is to be clipped."""
    ours, plain = grad_lists(dtype)
    norm = torch.zeros(3, dtype=F64)
    cpu, gpu = _C.GradList("cpu", torch.Tensor, plain), _C.GradList("simt", torch.Tensor, ours)
    cpu.norm(norm.data_ptr())
    cpu.clip(norm.data_ptr(), max_norm)
    with simt.counting() as counted:
        gpu.clip(norm.data_ptr(), max_norm)
    assert_same_bits(ours, plain)
    (kernel,) = counted.kernels
    assert (kernel.store_bytes > 0) == (max_norm < 1)
    own = torch.zeros(3, dtype=F64)
    gpu.norm(own.data_ptr())
    if max_norm < 1:
        assert abs(float(own.view(F32)[4]) - max_norm) < 0.01


def test_nan_clips_to_nan_as_in_torch():
    ours, plain = grad_lists(F32)
    for grads in (ours, plain):
        grads[2][7] = float("nan")
    norm = torch.zeros(3, dtype=F64)
    for backend, grads in zip(BACKENDS, (plain, ours), strict=True):
        grads_of = _C.GradList(backend, torch.Tensor, grads)
        grads_of.norm(norm.data_ptr())
        grads_of.clip(norm.data_ptr(), 1.0)
    assert_same_bits(ours, plain)
    assert ours[0].isnan().all()


# ---- counts ---------------------------------------------------------------------------------------------------------

LARGE = 1 << 16
CHUNK = 4096  # elements a warp takes in a large model; here fewer, so that what it looks up weighs more
FEW = LARGE // 1024  # warps

# Bytes per parameter that a step cannot do without.
TABLE = {
    "Adam fp32": (28, "adam", adam(), {}, {}),
    "Adam amsgrad fp32": (36, "adam", adam(amsgrad=1), {}, {}),
    "Adam fp64": (56, "adam", adam(), {"dtype": F64}, {}),
    "Adam bf16": (14, "adam", adam(), {"dtype": BF16}, {}),
    "Adam fp16": (14, "adam", adam(), {"dtype": F16}, {}),
    "Adam bf16, stochastic rounding": (14, "adam", adam(), {"dtype": BF16}, {"seed": 1}),
    "Adam fp32, bf16 states": (20, "adam", adam(), {"state_dtype": BF16}, {}),
    "Adam fp16, fp32 master": (28, "adam", adam(), {"dtype": F16, "state_dtype": F32, "master": "full"}, {}),
    "Adam bf16, fp32 master": (28, "adam", adam(), {"dtype": BF16, "state_dtype": F32, "master": "full"}, {}),
    "Adam bf16, split master": (26, "adam", adam(), {"dtype": BF16, "state_dtype": F32, "master": "low_half"}, {}),
    "Adam bf16, all split": (18, "adam", adam(), {"dtype": BF16, "master": "low_half"}, {}),
    "Adam fp32, gradients written": (32, "adam", adam(), {}, {"write_grads": True}),
    "SGD fp32": (12, "sgd", sgd(), {}, {}),
    "SGD momentum fp32": (20, "sgd", sgd(momentum=0.9), {}, {}),
    "SGD momentum bf16": (10, "sgd", sgd(momentum=0.9), {"dtype": BF16}, {}),
    "RMSprop fp32": (20, "rmsprop", rmsprop(), {}, {}),
    "RMSprop momentum fp32": (28, "rmsprop", rmsprop(momentum=0.9), {}, {}),
    "RMSprop all fp32": (36, "rmsprop", rmsprop(momentum=0.9, centered=1), {}, {}),
}  # fmt: skip


def assert_traffic(kernel, compulsory, per_warp, narrow=4):
    """compulsory: bytes per parameter. What a warp looks up, `per_warp` bytes, is 2 % of what CHUNK elements need."""
    beyond = kernel.sector_bytes - compulsory * LARGE
    assert 0 <= beyond <= per_warp * FEW, beyond / FEW
    assert per_warp <= 0.02 * compulsory * CHUNK
    assert kernel.coalescing >= 0.99
    warps = kernel.blocks * kernel.threads // 32
    assert kernel.lanes_of_width["16"] >= compulsory * LARGE // 16
    assert kernel.lanes_of_width["1"] == 0
    assert kernel.lanes_of_width["2"] == 0
    assert kernel.lanes_of_width["4"] <= narrow * warps, "step counters, arrivals"


@pytest.mark.parametrize("name", TABLE)
def test_bytes_per_parameter(name):
    compulsory, rule, hyper, kind, extra = TABLE[name]
    rows = Rows("simt", rule, specs_of([(LARGE,)], **kind), [hyper], seed=extra.get("seed"))
    options = Options(write_grads=extra.get("write_grads", False))
    rows.give_grads()
    rows.step(options)
    with simt.counting() as counted:
        rows.give_grads(1)
        rows.step(options)
    (kernel,) = counted.kernels
    assert [launch.kind for launch in counted.launches] == ["kernel"], "no copy when nothing has changed"
    assert_traffic(kernel, compulsory, 640)
    assert kernel.barriers == 0
    assert len(states_of(rule, hyper)) <= 3


@pytest.mark.parametrize(("dtype", "compulsory"), [(F32, 4), (BF16, 2), (F16, 2), (F64, 8)], ids=str)
def test_bytes_of_the_norm(dtype, compulsory):
    rows = Rows("simt", "sgd", specs_of([(LARGE,)], dtype=dtype), [sgd()])
    rows.give_grads()
    rows.norm()
    with simt.counting() as counted:
        rows.norm()
    (kernel,) = counted.kernels
    assert [launch.kind for launch in counted.launches] == ["kernel"]
    assert_traffic(kernel, compulsory, 160, narrow=33)  # each lane looks up the dtype


def test_launches_of_a_clipped_step():
    """The norm and the step, and the table is copied once for both."""
    rows = Rows("simt", "adam", specs_of([(5000,), (3,)]), [adam()])
    rows.give_grads()
    with simt.counting() as counted:
        options = Options(norm=rows.norm().raw, max_norm=1.0, skip_non_finite=True)
        rows.step(options)
    kinds = [launch.kind for launch in counted.launches]
    assert [launch.name for launch in counted.kernels] == ["grad_norm", "adam"]
    assert kinds.count("copy") == 2, "rows, groups"
    with simt.counting() as counted:
        rows.table.collect(rows.groups, {})
        rows.norm()
        rows.step(options)
    assert [launch.kind for launch in counted.launches] == ["kernel"] * 2


def test_a_skipped_step_reads_nothing_but_the_flag():
    rows = Rows("simt", "adam", specs_of([(LARGE,)]), [adam()])
    rows.give_grads()
    with simt.counting() as counted:
        rows.step(Options(found_inf=torch.tensor(1.0)))
    (kernel,) = counted.kernels
    assert kernel.store_bytes == 0
    assert kernel.load_bytes == 4 * kernel.blocks * kernel.threads


@each_rule
def test_only_heads_and_tails_are_scalar_in_a_tensor_that_lies_askew(rule, hyper):
    """However many work items it has, in one dtype and in several."""
    for kind, width in (({}, "4"), ({"dtype": BF16, "state_dtype": F32, "master": "low_half", "offset": 8}, "2")):
        streams = len(states_of(rule, hyper)) + 2
        rows = Rows("simt", rule, specs_of([(LARGE - 11,)], **{"offset": 4 if width == "2" else 5, **kind}), [hyper])
        rows.give_grads()
        with simt.counting() as counted:
            rows.step()
        (kernel,) = counted.kernels
        warps = kernel.blocks * kernel.threads // 32
        single = 2 * streams * 22  # elements of the head and the tail, in and out
        assert kernel.lanes_of_width["4"] <= 4 * warps + single
        assert kernel.lanes_of_width["2"] <= (single if width == "2" else 0)
