"""Bad input of the LSTM: an exception that says what came and what is allowed, in torch's words where it has some."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from deepops import functional
from deepops.nn import LSTM, LSTMCell

pytestmark = pytest.mark.usefixtures("one_thread")

T, B, I, H = 5, 3, 4, 6  # noqa: E741
X = torch.randn(T, B, I)


def states(places: int = 1, batch: int = B, h: int = H, c: int = H, **options: Any) -> Any:
    return torch.zeros(places, batch, h, **options), torch.zeros(places, batch, c, **options)


STOCK_CONSTRUCTION: dict[str, Any] = {
    "proj_size": ({"proj_size": H}, ValueError, "proj_size has to be smaller than hidden_size"),
    "negative proj_size": ({"proj_size": -1}, ValueError, "proj_size should be a positive integer or zero"),
    "dropout": ({"dropout": 1.5}, ValueError, r"dropout should be a number in range \[0, 1\]"),
    "dropout True": ({"dropout": True}, ValueError, r"dropout should be a number in range \[0, 1\]"),
    "hidden_size": ({"hidden_size": 0}, ValueError, "hidden_size must be greater than zero"),
    "hidden_size 6.0": ({"hidden_size": 6.0}, TypeError, "hidden_size should be of type int, got: float"),
    "num_layers": ({"num_layers": 0}, ValueError, "num_layers must be greater than zero"),
    "bias": ({"bias": 1}, TypeError, "bias should be of type bool, got: int"),
}


@pytest.mark.parametrize("case", STOCK_CONSTRUCTION)
def test_construction_as_stock(case: str) -> None:
    options, error, message = STOCK_CONSTRUCTION[case]
    for kind in (LSTM, nn.LSTM):
        with pytest.raises(error, match=message):
            kind(**({"input_size": I, "hidden_size": H} | options))


def test_dropout_of_one_layer_warns_as_stock() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        LSTM(I, H, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LSTM(I, H, 2, dropout=0.5)


CONSTRUCTION: dict[str, Any] = {
    "layer_norm": ({"layer_norm": 1}, TypeError, "layer_norm: expected True or False, got 1"),
    "layer_norm_eps": ({"layer_norm_eps": -1.0}, ValueError, r"layer_norm_eps: expected .* at least 0, got -1\.0"),
    "peephole": ({"peephole": "yes"}, TypeError, "peephole: expected True or False, got 'yes'"),
    "zoneout": ({"zoneout": 1.5}, ValueError, r"zoneout: expected a number or two, \(h, c\), in \[0, 1\], got 1\.5"),
    "zoneout of c": ({"zoneout": (0.1, -0.1)}, ValueError, r"zoneout: expected .* in \[0, 1\], got -0\.1"),
    "zoneout, three": ({"zoneout": (0.1, 0.1, 0.1)}, ValueError, r"zoneout: expected a number or two.*got \(0\.1"),
    "zoneout NaN": ({"zoneout": float("nan")}, ValueError, "zoneout: expected .* got nan"),
    "variational_dropout": (
        {"variational_dropout": "0.1"},
        ValueError,
        r"variational_dropout: expected a number or two, \(input, hidden\), in \[0, 1\], got '0\.1'",
    ),
    "recurrent_dropout": (
        {"recurrent_dropout": (0.1, 0.2)},
        ValueError,
        r"recurrent_dropout: expected a number in \[0, 1\], got \(0\.1, 0\.2\)",
    ),
    "cell_clip": ({"cell_clip": 0.0}, ValueError, r"cell_clip: expected a positive number or None, got 0\.0"),
    "forget_bias": ({"forget_bias": "1"}, TypeError, "forget_bias: expected a number or None, got '1'"),
    "forget_bias without bias": ({"forget_bias": 1.0, "bias": False}, ValueError, "forget_bias: expected None with"),
}


@pytest.mark.parametrize("kind", [LSTM, LSTMCell])
@pytest.mark.parametrize("case", CONSTRUCTION)
def test_construction(case: str, kind: Any) -> None:
    options, error, message = CONSTRUCTION[case]
    with pytest.raises(error, match=message):
        kind(I, H, **options)


def test_construction_of_the_layer_alone() -> None:
    with pytest.raises(TypeError, match="return_all_states: expected True or False, got None"):
        LSTM(I, H, return_all_states=None)
    with pytest.raises(TypeError, match="positional argument"):
        LSTMCell(I, H, True, None, None, True)


STOCK_CALLS: dict[str, Any] = {
    "features": (
        (torch.randn(T, B, I + 1),),
        RuntimeError,
        r"input.size\(-1\) must be equal to input_size. Exp.* 4, got 5",
    ),
    "rank": ((torch.randn(2, T, B, I),), ValueError, "LSTM: Expected input to be 2D or 3D, got 4D instead"),
    "no steps": ((torch.randn(0, B, I),), RuntimeError, "Expected sequence length to be larger than 0 in RNN"),
    "dtype": ((X.double(),), ValueError, r"RNN input dtype \(torch.float64\) does not match weight dtype"),
    "h0's batch": ((X, states(batch=2)), RuntimeError, r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 2, 6\]"),
    "h0's size": ((X, states(h=5)), RuntimeError, r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 3, 5\]"),
    "c0's size": ((X, states(c=5)), RuntimeError, r"Expected hidden\[1\] size \(1, 3, 6\), got \[1, 3, 5\]"),
    "layers of h0": ((X, states(2)), RuntimeError, r"Expected hidden\[0\] size \(1, 3, 6\), got \[2, 3, 6\]"),
    "rank of h0": (
        (X, (torch.zeros(1, H), torch.zeros(1, H))),
        RuntimeError,
        r"For batched 3-D input, hx and cx should also be 3-D but got \(2-D, 2-D\) tensors",
    ),
    "unbatched, rank of h0": (
        (X[:, 0], states(batch=1)),
        RuntimeError,
        r"For unbatched 2-D input, hx and cx should also be 2-D but got \(3-D, 3-D\) tensors",
    ),
    "packed, features": (
        (pack_padded_sequence(torch.randn(T, B, 5), torch.tensor([5, 4, 2])),),
        RuntimeError,
        r"input.size\(-1\) must be equal to input_size. Exp.* 4, got 5",
    ),
    "packed, h0's batch": (
        (pack_padded_sequence(X, torch.tensor([5, 4, 2])), states(batch=2)),
        RuntimeError,
        r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 2, 6\]",
    ),
}


@pytest.mark.parametrize("kind", [LSTM, nn.LSTM], ids=["ours", "stock"])
@pytest.mark.parametrize("case", STOCK_CALLS)
def test_calls_as_stock(case: str, kind: Any) -> None:
    if kind is nn.LSTM and case.startswith("packed"):
        pytest.skip("stock does not look at packed input and leaves the error to a product")
    arguments, error, message = STOCK_CALLS[case]
    with pytest.raises(error, match=message):
        kind(I, H)(*arguments)


CALLS: dict[str, Any] = {
    "input": (([1.0],), {}, TypeError, "input: expected a torch.Tensor, got list"),
    "integers": ((torch.ones(T, B, I, dtype=torch.int64),), {}, TypeError, "input: expected float32.*got torch.int64"),
    "sparse": ((X.to_sparse(),), {}, TypeError, "input: expected a dense"),
    "hx": ((X, states()[0]), {}, TypeError, r"hx: expected a pair of tensors, \(h_0, c_0\), got Tensor"),
    "hx of three": ((X, (1, 2, 3)), {}, TypeError, r"hx: expected a pair of tensors.*got 3 things"),
    "hx[1]": ((X, (states()[0], None)), {}, TypeError, r"hx\[1\]: expected a torch.Tensor, got NoneType"),
    "hx's dtype": ((X, states(dtype=torch.float64)), {}, TypeError, r"hx\[0\]: expected torch.float32, the dtype of"),
    "hx's device": ((X, states(device="meta")), {}, ValueError, r"hx\[0\]: expected device cpu.*got meta"),
    "device": ((X.to("meta"),), {}, ValueError, "input: expected device cpu, where the parameters are, got meta"),
    "lengths too long": ((X,), {"lengths": [5, 6, 1]}, ValueError, "lengths: expected numbers from 0 to 5.*got 6"),
    "negative length": ((X,), {"lengths": torch.tensor([5, 2, -1])}, ValueError, "lengths: expected numbers.*got -1"),
    "lengths' dtype": ((X,), {"lengths": torch.ones(B)}, TypeError, "lengths: expected an int64 tensor.*torch.float32"),
    "int32 lengths": ((X,), {"lengths": torch.ones(B).int()}, TypeError, "lengths: expected an int64.*torch.int32"),
    "lengths of floats": ((X,), {"lengths": [1.0, 2.0, 3.0]}, TypeError, "lengths: expected an int64 tensor or"),
    "one length": ((X,), {"lengths": 3}, TypeError, "lengths: expected an int64 tensor or .*got 3"),
    "lengths' shape": ((X,), {"lengths": [1, 2]}, ValueError, r"lengths: expected shape \[3\], one.*got \[2\]"),
    "lengths' rank": (
        (X,),
        {"lengths": torch.ones(1, B).long()},
        ValueError,
        r"lengths: expected shape \[3\].*\[1, 3\]",
    ),
    "lengths, unbatched": ((X[:, 0],), {"lengths": [3]}, ValueError, "lengths: expected None beside an input"),
    "lengths, packed": (
        (pack_padded_sequence(X, torch.tensor([5, 4, 2])),),
        {"lengths": [5, 4, 2]},
        ValueError,
        "lengths: expected None beside a PackedSequence",
    ),
    "seed": ((X,), {"seed": 1.5}, TypeError, "seed: expected an integer or one int64 number, got float"),
    "seed's dtype": ((X,), {"seed": torch.tensor([1.0])}, TypeError, "seed: expected .* a tensor of torch.float32"),
    "seeds": ((X,), {"seed": torch.tensor([1, 2])}, TypeError, r"seed: expected .* shape \[2\]"),
    "large seed": ((X,), {"seed": 2**64}, ValueError, "seed: expected an integer of 64 bits, got 18446"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls(case: str) -> None:
    arguments, options, error, message = CALLS[case]
    lstm = LSTM(I, H, recurrent_dropout=0.5)
    with pytest.raises(error, match=message):
        lstm(*arguments, **options)


@pytest.mark.parametrize("case", ["input", "integers", "hx", "hx's dtype", "device"])
def test_calls_of_the_plain_layer(case: str) -> None:
    arguments, options, error, _ = CALLS[case]
    with pytest.raises((error, AttributeError, IndexError, RuntimeError, ValueError)):
        LSTM(I, H)(*arguments, **options)


CELL_CALLS: dict[str, Any] = {
    "features": ((torch.randn(B, I + 1),), {}, RuntimeError, "input has inconsistent input_size: got 5 expected 4"),
    "rank": ((X,), {}, ValueError, "LSTMCell: Expected input to be 1D or 2D, got 3D instead"),
    "hx's rank": ((X[0], states()), {}, ValueError, r"LSTMCell: Expected hx\[0\] to be 1D or 2D, got 3D instead"),
    "h's size": ((X[0], (torch.zeros(B, 5), torch.zeros(B, 6))), {}, RuntimeError, "hidden0 has inconsistent hidden"),
    "c's batch": (
        (X[0], (torch.zeros(B, 6), torch.zeros(2, 6))),
        {},
        RuntimeError,
        "Input batch size 3 doesn't match hidden1 batch size 2",
    ),
    "dtype": ((X[0].double(),), {}, TypeError, "input: expected torch.float32, the dtype of the parameters, got"),
    "hx": ((X[0], X[0]), {}, TypeError, r"hx: expected a pair of tensors, \(h_0, c_0\), got Tensor"),
    "hx's dtype": ((X[0], (torch.zeros(B, H).double(),) * 2), {}, TypeError, r"hx\[0\]: expected torch.float32"),
    "step": ((X[0],), {"step": 1.0}, TypeError, "step: expected an integer, got float"),
    "negative step": ((X[0],), {"step": -1}, ValueError, "step: expected a number of at least 0, got -1"),
    "no seed": ((X[0],), {"seed": None}, ValueError, "seed: expected one for all steps of a sequence"),
}


@pytest.mark.parametrize("case", CELL_CALLS)
def test_cell_calls(case: str) -> None:
    arguments, options, error, message = CELL_CALLS[case]
    with pytest.raises(error, match=message):
        LSTMCell(I, H, variational_dropout=0.5)(*arguments, **({"seed": 1} | options))


VECTOR, MATRIX = torch.randn(4 * H), torch.randn(4 * H, H)
FUNCTION: dict[str, Any] = {
    "x": ({"x": X[0]}, ValueError, r"x: expected shape \[T, B, I\] with T > 0, got \[3, 4\]"),
    "no steps": ({"x": X[:0]}, ValueError, r"x: expected shape \[T, B, I\] with T > 0, got \[0, 3, 4\]"),
    "weight_ih": ({"weight_ih": MATRIX}, ValueError, r"weight_ih: expected shape \[24, 4\], got \[24, 6\]"),
    "weight_ih None": ({"weight_ih": None}, TypeError, "weight_ih: expected a torch.Tensor, got NoneType"),
    "weight_hh": ({"weight_hh": MATRIX[:5]}, ValueError, r"weight_hh: expected shape \[4 \* H, R\], got \[5, 6\]"),
    "bias_hh": ({"bias_hh": VECTOR[:5]}, ValueError, r"bias_hh: expected shape \[24\], got \[5\]"),
    "weight_hr": ({"weight_hr": MATRIX[:6]}, ValueError, r"weight_hr: expected shape \[P, H\] with P < H"),
    "weight_peephole": ({"weight_peephole": VECTOR}, ValueError, r"weight_peephole: expected shape \[18\]"),
    "layer norm": ({"weight_ln_ih": VECTOR}, ValueError, "weight_ln_hh: expected a tensor beside the others"),
    "dtype": ({"bias_ih": VECTOR.double()}, TypeError, "bias_ih: expected torch.float32.*got torch.float64"),
    "hx": ({"hx": states()}, ValueError, r"hx\[0\]: expected shape \[3, 6\], got \[1, 3, 6\]"),
    "zoneout": ({"zoneout": 2}, ValueError, "zoneout: expected"),
    "first_step": ({"first_step": -1}, ValueError, "first_step: expected an integer of at least 0, got -1"),
}


@pytest.mark.parametrize("case", FUNCTION)
def test_function(case: str) -> None:
    changes, error, message = FUNCTION[case]
    arguments = {"x": X, "hx": None, "weight_ih": MATRIX[:, :I], "weight_hh": MATRIX}
    functional.lstm(**arguments)
    with pytest.raises(error, match=message):
        functional.lstm(**(arguments | changes))


def test_function_of_a_step() -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[B, I\], got \[5, 3, 4\]"):
        functional.lstm_cell(X, None, MATRIX[:, :I], MATRIX)


def test_nothing_is_drawn_by_a_call_that_fails() -> None:
    lstm, before = LSTM(I, H, zoneout=0.5), torch.random.get_rng_state()
    for bad in (torch.randn(T, B, I + 1), X.double()):
        torch.random.set_rng_state(before)
        with pytest.raises((RuntimeError, ValueError)):
            lstm(bad)
        assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kind", [LSTM, LSTMCell])
def test_options_can_be_changed_as_dropout_of_torchs_can(kind: type[nn.Module]) -> None:
    """The module does what one made with these options would do, and bad values are refused and change nothing."""
    x = torch.randn(3, 2, 5)[0 if kind is LSTMCell else slice(None)]
    for name, value in (("zoneout", 0.5), ("cell_clip", 0.01), ("recurrent_dropout", 0.5), ("zoneout", (0.2, 0.0))):
        module, other = kind(5, 7), kind(5, 7, **{name: value})
        other.load_state_dict(module.state_dict())
        plain = module(x, seed=1)[0]
        setattr(module, name, value)
        assert torch.equal(other(x, seed=1)[1][0], module(x, seed=1)[1][0])
        assert str(module) == str(other)
        setattr(module, name, None if name == "cell_clip" else 0.0)
        assert torch.equal(module(x, seed=1)[0], plain)
        with pytest.raises((TypeError, ValueError), match=name):
            setattr(module, name, "much")
        assert torch.equal(module(x, seed=1)[0], plain)


def test_a_cell_without_hidden_units_is_what_torch_makes_of_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # initializing nothing
        cell = LSTMCell(5, 0)
    assert [state.shape for state in cell(torch.randn(2, 5))] == [(2, 0), (2, 0)]


def test_a_plain_cell_looks_at_seed_and_step() -> None:
    cell = LSTMCell(5, 7)
    with pytest.raises(TypeError, match="seed"):
        cell(torch.randn(2, 5), seed="bad")
    with pytest.raises(ValueError, match="step: expected a number of at least 0, got -3"):
        cell(torch.randn(2, 5), step=-3)
