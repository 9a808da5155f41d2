"""What the ``batch_norm_act`` ops promise to the bit, and what is counted: determinism, masks, regions, options."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from bn_cases import ACTIVATIONS, DTYPES, FORMATS, Case, backward, evaluate, kept, make_case, op_results, train

from deepops import functional, testing

# Small, channel-rich and channel-poor work, tails of every length, and enough of it to be shared between threads.
BITWISE_SHAPES = [
    (2, 3, 5, 7),
    (4, 33, 3, 3),
    (16, 64, 14, 14),
    (1, 1, 300, 301),
    (5, 2, 190, 191),  # several work items to a channel
    (33, 130, 5, 5),
    (700, 17, 1, 1),
]
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
each_layout = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"]
)


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        different = int((actual[name] != expected[name]).sum())
        assert different == 0, f"{what}: {different} of {actual[name].numel()} elements of {name} differ"


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_modes
def test_same_bits_on_every_instruction_set(training, dtype, memory_format):
    assert len(testing.isas()) >= 1
    for shape, activation in product(BITWISE_SHAPES, ACTIVATIONS):
        if activation not in ("relu", "gelu") and shape != BITWISE_SHAPES[1]:
            continue
        case = make_case(shape, dtype, memory_format, activation=activation, residual=shape[0] % 2 == 0, mean=3.0)
        results = []
        for isa in testing.isas():
            with testing.use_isa(isa):
                results.append(op_results(case, training))
        for isa, result in zip(testing.isas(), results, strict=True):
            assert_same_bits(result, results[0], f"{isa} against baseline, {list(shape)}, {activation}")


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@both_modes
def test_same_bits_on_any_number_of_threads_and_in_every_run(training, dtype, memory_format):
    for shape in BITWISE_SHAPES:
        case = make_case(shape, dtype, memory_format, activation="silu", residual=shape[0] % 2 == 1, mean=3.0)
        with testing.use_threads(1):
            expected = op_results(case, training)
            assert_same_bits(op_results(case, training), expected, f"second run, {list(shape)}")
        for threads in (2, 3):
            with testing.use_threads(threads):
                assert_same_bits(op_results(case, training), expected, f"{threads} threads, {list(shape)}")


@pytest.mark.parametrize("layout", FORMATS)
def test_no_result_depends_on_what_lies_in_fresh_memory(layout):
    """Outputs are allocated unfilled: fill freed memory of their size with NaN, then run again."""
    rank, memory_format = FORMATS[layout]
    shape = {2: (70, 33), 3: (6, 33, 13), 4: (5, 33, 7, 3), 5: (2, 33, 3, 2, 3)}[rank]
    case = make_case(shape, memory_format=memory_format, activation="relu", residual=True)
    first = op_results(case, True)
    poison = [torch.full_like(case.x, torch.nan) for _ in range(8)] + [torch.full((33,), torch.nan) for _ in range(64)]
    del poison
    assert_same_bits(op_results(case, True), first, "after NaN in freed memory")


@each_layout
@pytest.mark.parametrize("shape", BITWISE_SHAPES, ids=str)
def test_at_most_one_parallel_region_per_pass(shape, memory_format):
    case = make_case(shape, memory_format=memory_format, residual=True)
    with testing.count_parallel_regions() as forward:
        y, mean, invstd = train(case.clone())
    with testing.count_parallel_regions() as backwards:
        backward(case, y, mean, invstd, training=True)
    with testing.count_parallel_regions() as evaluation:
        evaluate(case)
    with testing.count_parallel_regions() as evaluation_backward:
        backward(case, y, *case.statistics(), training=False)
    # The statistics and their application: two passes each way. Evaluation needs no statistics.
    assert 1 <= forward.count <= 2
    assert 1 <= backwards.count <= 2
    assert evaluation.count == 1
    assert 1 <= evaluation_backward.count <= 2


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "relu6", "identity", "silu"])
def test_offset_memory_gives_the_same_bits(activation, dtype, memory_format):
    """Tensors that start one element after an aligned address."""
    case = make_case((3, 17, 5, 7), dtype, memory_format, activation=activation, residual=True)

    def shift(t: torch.Tensor) -> torch.Tensor:
        flat = t.new_zeros(t.numel() + 1)[1:]
        return flat.as_strided(t.shape, t.stride(), 1).copy_(t)

    names = ["x", "residual", "weight", "bias", "running_mean", "running_var", "grad_y"]
    moved = replace(case, **{name: shift(getattr(case, name)) for name in names})
    assert all(getattr(moved, name).data_ptr() % (2 * dtype.itemsize) != 0 for name in ("x", "residual", "grad_y"))
    for training in (True, False):
        assert_same_bits(op_results(moved, training), op_results(case, training), f"training={training}")


@each_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("relu6", 0.0), ("leaky_relu", 0.0)])
@pytest.mark.parametrize("residual", [False, True])
@both_modes
def test_mask_of_the_backward_is_the_forward_s(training, residual, activation, slope, dtype, memory_format):
    """The derivative is 1 exactly where the output is between the kinks, also where rounding decides.

    In many pre-activations the sum cancels: bias = -weight * xhat up to rounding. A mask from any other arithmetic than
    the forward's disagrees somewhere among them.
    """
    case = make_case((8, 33, 8, 9), dtype, memory_format, activation=activation, negative_slope=slope)
    x = torch.randint(-3, 4, case.x.shape).to(dtype).contiguous(memory_format=memory_format)
    case = replace(case, x=x, residual=torch.zeros_like(x) if residual else None, grad_y=torch.ones_like(x))
    case = replace(case, bias=balanced_bias(case, training))
    y, mean, invstd = train(case.clone()) if training else (evaluate(case), *case.statistics())
    near_zero = (y.abs() < 1e-3).sum().item()
    assert near_zero > 500, "the case lost its point"
    inside = (y > 0) if activation != "relu6" else (y > 0) & (y < 6)
    kept_y = y if residual else None
    _, dz, _, grad_bias = torch.ops.deepops.batch_norm_act_backward(
        case.grad_y, case.x, kept_y, case.weight, case.bias, mean, invstd, training, activation, slope, True, True, True
    )
    assert torch.equal(grad_bias, dz.double().sum([0, 2, 3]).to(grad_bias.dtype))  # whole numbers: exact
    if dtype.itemsize == 2 and not residual:  # y may have been rounded onto a kink, where the mask from x is finer
        decided = (y != 0) & (y != 6)
        dz, inside = dz[decided], inside[decided]
    assert torch.equal(dz != 0, inside)


def balanced_bias(case: Case, training: bool) -> torch.Tensor:
    """A bias that makes the pre-activation of the elements with x = 1 zero up to rounding."""
    _, mean, invstd = train(case.clone()) if training else (None, *case.statistics())
    assert case.weight is not None
    return -((1.0 - mean) * invstd * case.weight)


@each_layout
@both_modes
def test_only_the_wanted_gradients_and_the_same_bits(training, memory_format):
    for activation in ("relu", "silu"):
        case = make_case((4, 19, 5, 3), memory_format=memory_format, activation=activation, residual=True)
        y, mean, invstd = train(case.clone()) if training else (evaluate(case), *case.statistics())
        everything = backward(case, y, mean, invstd, training, (True, True, True))
        assert all(gradient.numel() for gradient in everything.values())
        for need in product((False, True), repeat=3):
            some = backward(case, y, mean, invstd, training, need)
            assert_same_bits(some, {name: everything[name] for name in some}, f"need={need}")


def test_backward_changes_none_of_its_inputs():
    case = make_case((4, 19, 5, 3), residual=True, activation="silu")
    y, mean, invstd = train(case.clone())
    inputs = [case.grad_y, case.x, case.residual, case.weight, case.bias, mean, invstd]
    before = [t.clone() for t in inputs]
    results = backward(case, y, mean, invstd, training=True)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))
    addresses = {t.data_ptr() for t in inputs}
    assert not addresses & {t.data_ptr() for t in results.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
@pytest.mark.parametrize("options", ["plain", "residual", "bare"])
def test_opcheck(options, layout, dtype):
    """Schema (what is mutated, what aliases) and fake kernels: shapes, dtypes and strides."""
    assert functional  # importing it registers the fakes
    rank, memory_format = FORMATS[layout]
    case = make_case(
        (4, 5) if rank == 2 else (4, 5, 3, 2), dtype, memory_format, residual=options == "residual",
        affine=options != "bare", activation="silu",
    )  # fmt: skip
    if options == "bare":
        case = replace(case, running_mean=None, running_var=None, num_batches_tracked=None)
    y, mean, invstd = train(case.clone())
    c = case.clone()
    ops = torch.ops.deepops
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.batch_norm_act_train.default,
        (
            c.x,
            c.residual,
            c.weight,
            c.bias,
            c.running_mean,
            c.running_var,
            c.num_batches_tracked,
            0.1,
            1e-5,
            "silu",
            0.0,
        ),
        test_utils=utilities,
    )
    torch.library.opcheck(
        ops.batch_norm_act_eval.default,
        (c.x, c.residual, c.weight, c.bias, mean, invstd, "silu", 0.0),
        test_utils=utilities,
    )
    for need in [(True, options == "residual", options != "bare"), (False, False, False)]:
        torch.library.opcheck(
            ops.batch_norm_act_backward.default,
            (c.grad_y, c.x, kept(case, y), c.weight, c.bias, mean, invstd, True, "silu", 0.0, *need),
            test_utils=utilities,
        )
