"""Adam's GPU kernel on the SIMT executor: the CPU kernel's bits, and what is counted and promised of a step.

Values, plan and state are tested on the same cases as the CPU kernels: the tests with the ``step_backend`` fixture.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import simt
import torch
from optim_cases import (
    DTYPES,
    OPTIONS,
    SHAPES,
    SimtAdam,
    assert_same_bits,
    attach_simt,
    everything,
    give_grads,
    make,
    needs_kernel,
    train,
)

import deepops
from deepops.optim import Adam

pytestmark = needs_kernel

LARGE = 1 << 16  # elements: 64 work items
STREAMS = {False: 7, True: 9}  # by amsgrad: param, exp_avg, exp_avg_sq (max_exp_avg_sq) in and out, gradient in


@pytest.fixture(autouse=True)
def _attached(on_simt):
    attach_simt()


def assert_same_run(build: Callable[[], Sequence[torch.nn.Parameter]], options=None, steps=3, without=()):
    """A run on the CPU kernel and one on the GPU kernel: the same bits in parameters, states and counters."""
    results = []
    for cls in (Adam, SimtAdam):
        params = build()
        optimizer = cls(params, **(options or {}))
        for step in range(steps):
            give_grads(params, seed=step)
            for index in without[step : step + 1]:
                params[index].grad = None
            optimizer.step()
        assert "torch" not in optimizer._explain()
        results.append([p.detach() for p in params])
        results.append([t for p in params for t in optimizer.state[p].values()])
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_of_the_cpu_kernel(options, dtype):
    assert_same_run(lambda: make(dtype=dtype), options, without=(3, 7))


def test_bits_of_the_cpu_kernel_with_all_dtypes_and_groups_together():
    def run(cls):
        groups = [
            {"params": make([(5,), (0,), (1500,), (2, 3)], dtype), **options}
            for dtype, options in itertools.product(DTYPES, OPTIONS)
        ]
        optimizer = cls(groups)
        params = [p for group in groups for p in group["params"]]
        for step in range(3):
            give_grads(params, seed=step)
            optimizer.step()
        return [*params, *(t for p in params for t in optimizer.state[p].values())]

    assert_same_bits(run(Adam), run(SimtAdam))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_any_alignment(amsgrad, dtype):
    """Streams that begin at any place modulo 16, together and each for itself, in tensors of one and of many items."""
    size = torch.empty((), dtype=dtype).element_size()
    options = {"amsgrad": amsgrad, "weight_decay": 0.1}
    for count, offset, odd in itertools.product((3, 40, 2500), range(0, 16 // size, 3), (None, 0, 1, 2, 3)):
        results = []
        for cls in (Adam, SimtAdam):
            wide = [t.detach() for t in make([(count + 32,)] * 5, dtype)]
            # The parameter, its gradient and its states; one of them may lie elsewhere than the others.
            streams = [t[s : s + count] for i, t in enumerate(wide) for s in [offset + (odd == i)]]
            for t in wide[3:]:
                t.abs_()
            param = torch.nn.Parameter(streams[0])
            param.grad = streams[1]
            optimizer = cls([param], **options)
            names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + amsgrad]
            optimizer.state[param] = dict(zip(("step", *names), (torch.tensor(4.0), *streams[2:]), strict=False))
            optimizer.step()
            assert param.data_ptr() == streams[0].data_ptr()
            results.append([*wide, optimizer.state[param]["step"]])
        assert_same_bits(*results)


@pytest.mark.parametrize("step", [0.0, 1.0, 2.0, 6.0, 999.0, 65_535.0, 2.0**24 - 2, 2.0**24, 2.5, 3e9, 1e20])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5), (0.99, 1 - 1e-7), (0.9995, 0.9999)])
def test_bits_at_any_step(betas, step):
    """Powers of the betas: every bit of the counter, counters that have stopped, and ones that are not counts."""
    results = []
    for cls in (Adam, SimtAdam):
        params = make([(300,)], torch.float64)
        optimizer = cls(params, betas=betas)
        train(optimizer, params, 1)
        optimizer.state[params[0]]["step"].fill_(step)
        train(optimizer, params, 1, first=1)
        assert optimizer.state[params[0]]["step"] == torch.tensor(step) + 1
        results.append(everything(optimizer, params))
    assert_same_bits(*results)


@pytest.mark.parametrize("schedule", ["reverse", "random"])
def test_bits_in_any_order_of_blocks_and_threads(schedule):
    for seed in range(1, 4):
        with simt.schedule(schedule, seed):
            assert_same_run(lambda: make([*SHAPES, (3, 7)], torch.float16), OPTIONS[1])


# ---- counts ---------------------------------------------------------------------------------------------------------


def test_one_launch_and_no_copy_when_nothing_has_changed():
    groups = [{"params": make(dtype=dtype), "lr": lr} for lr, dtype in zip((0.1, 0.2, 0.3, 0.4), DTYPES, strict=True)]
    optimizer = SimtAdam(groups)
    params = [p for group in groups for p in group["params"]]

    def kinds():
        with simt.counting() as counted:
            optimizer.step()
        return [launch.kind for launch in counted.launches]

    give_grads(params)
    assert sorted(kinds()) == ["copy", "copy", "kernel", "memset"], "rows, groups; counters of arrivals"
    assert kinds() == ["kernel"]
    old = [p.grad for p in params]  # alive, so that the new ones lie elsewhere
    give_grads(params, seed=1)
    assert old
    assert kinds() == ["copy", "kernel"], "rows"
    groups[1]["lr"] = 0.5
    optimizer.param_groups[1]["lr"] = 0.5
    assert kinds() == ["copy", "kernel"], "groups"
    params[3].grad = None
    assert kinds() == ["copy", "kernel"]
    optimizer.zero_grad()
    assert kinds() == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_memory_traffic(amsgrad, dtype):
    params = make([(LARGE,)], dtype)
    optimizer = SimtAdam(params, amsgrad=amsgrad)
    train(optimizer, params, 1)
    with simt.counting() as counted:
        optimizer.step()
    (kernel,) = counted.kernels
    size = torch.empty((), dtype=dtype).element_size()
    compulsory = STREAMS[amsgrad] * size * LARGE
    # What a warp looks up costs the same for small elements, of which it has as many.
    assert kernel.sector_bytes / compulsory <= (1.02 if size >= 4 else 1.04)
    assert kernel.coalescing >= 0.99
    warps = kernel.blocks * kernel.threads // 32
    packs = compulsory // 16
    assert kernel.lanes_of_width["16"] - packs in range(32 * 10 * warps + 1), "beyond the data: 10 packs a warp"
    assert kernel.lanes_of_width["1"] == 0
    assert kernel.lanes_of_width["2"] == 0
    assert kernel.lanes_of_width["4"] <= 4 * warps, "step counters, arrivals"
    assert kernel.barriers == 0


def test_only_heads_and_tails_are_scalar_in_a_tensor_that_lies_askew():
    """However many work items it has."""
    wide = make([(LARGE,)])[0].detach()
    param = torch.nn.Parameter(wide[5:-6])
    param.grad = wide.clone()[5:-6]
    optimizer = SimtAdam([param])
    state = {name: torch.zeros(LARGE)[5:-6] for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[param] = {"step": torch.tensor(0.0), **state}
    with simt.counting() as counted:
        optimizer.step()
    (kernel,) = counted.kernels
    assert kernel.lanes_of_width["4"] - 7 * (3 + 2) <= 4 * kernel.blocks * kernel.threads // 32
    assert kernel.coalescing >= 0.99


# ---- the rest -------------------------------------------------------------------------------------------------------


def test_empty_tensors_count_their_steps():
    assert_same_run(lambda: make([(0,), (3, 0)]))
    assert_same_run(lambda: make([(0,), (5,), (3, 0)]))


def test_switching_between_backends_in_mid_training():
    params, plain = make(), make()
    optimizer, other = SimtAdam(params), Adam(plain)
    for step in range(4):
        give_grads(params, plain, seed=step)
        if step == 2:
            optimizer.__class__ = Adam
            optimizer._plans = None
        optimizer.step()
        other.step()
    assert_same_bits(everything(optimizer, params), everything(other, plain))


def test_there_is_no_kernel_for_an_unknown_backend():
    with pytest.raises(ValueError, match="there is no 'adam' for 'nowhere'"):
        deepops._library._C.StepTable("adam", "nowhere", torch.Tensor, (), {}, ())
    with pytest.raises(RuntimeError, match="lacks the symbol deepops_adam_step_cuda"):
        deepops._library._C.attach(str(deepops._library._PATHS["_ops"]), "cuda")
    with pytest.raises(RuntimeError, match="not loaded"):
        deepops._library._C.attach("/nowhere.so", "cuda")


def test_capturable_is_covered_where_the_counters_are_on_the_gpu():
    params, plain = make(), make()
    optimizer, other = SimtAdam(params, capturable=True), Adam(plain)
    train(optimizer, params, 3)
    train(other, plain, 3)
    assert "deepops kernel" in optimizer._explain()
    assert_same_bits(params, plain)
    optimizer.param_groups[0]["capturable"] = False
    train(optimizer, params, 1, first=3)
    train(other, plain, 1, first=3)
    assert_same_bits(params, plain)
