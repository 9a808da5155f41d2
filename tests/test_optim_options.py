"""The options beyond torch's: what is wrong or excludes each other is named, with what came and what is allowed."""

import math

import pytest
import torch
from optim_cases import each_kind, make, needs_kernel

pytestmark = needs_kernel

WRONG = [  # options, error, what the message names
    ({"max_grad_nrom": 1.0}, TypeError, "got an unexpected keyword argument 'max_grad_nrom'"),
    ({"max_grad_norm": 0}, ValueError, "max_grad_norm: expected a positive number or None, got 0"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm: expected a positive number or None, got -1.0"),
    ({"max_grad_norm": math.inf}, ValueError, "max_grad_norm: expected a positive number or None, got inf"),
    ({"max_grad_norm": math.nan}, ValueError, "max_grad_norm: expected a positive number or None, got nan"),
    ({"max_grad_norm": "1"}, ValueError, "max_grad_norm: expected a positive number or None, got '1'"),
    ({"max_grad_norm": True}, ValueError, "max_grad_norm: expected a positive number or None, got True"),
    ({"master_weights": "both"}, ValueError, "master_weights: expected False, True or 'split', got 'both'"),
    ({"master_weights": None}, ValueError, "master_weights: expected False, True or 'split', got None"),
    ({"master_weights": 1}, ValueError, "master_weights: expected False, True or 'split', got 1"),
    ({"master_weights": []}, ValueError, r"master_weights: expected False, True or 'split', got \[\]"),
    ({"stochastic_rounding": 1}, TypeError, "stochastic_rounding: expected a bool, got 1"),
    ({"diagnostics": "yes"}, TypeError, "diagnostics: expected a bool, got 'yes'"),
    ({"state_dtype": torch.float64}, ValueError, "state_dtype: expected torch.float32, .*got torch.float64"),
    ({"state_dtype": torch.int8}, ValueError, "state_dtype: expected torch.float32, .*got torch.int8"),
    ({"state_dtype": "bf16"}, ValueError, "state_dtype: expected torch.float32, .*got '?bf16'?"),
    ({"seed": 1}, ValueError, "seed is for stochastic_rounding=True"),
    ({"seed": -1, "stochastic_rounding": True}, ValueError, r"seed: expected an integer from 0 to .*, got -1"),
    ({"seed": 2**64, "stochastic_rounding": True}, ValueError, r"seed: expected an integer from 0 to 2\*\*64 - 1"),
    ({"seed": 0.5, "stochastic_rounding": True}, ValueError, r"seed: expected an integer from 0 to .*, got 0.5"),
    (
        {"stochastic_rounding": True, "master_weights": True},
        ValueError,
        "stochastic_rounding and master_weights exclude each other",
    ),
    (
        {"stochastic_rounding": True, "master_weights": "split"},
        ValueError,
        "stochastic_rounding and master_weights exclude each other",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=str)
@each_kind
def test_wrong_options_are_named(kind, options, error, message):
    params = make([(3,)])
    with pytest.raises(error, match=message):
        kind.ours(params, **options)
    assert params[0].grad is None
    assert torch.equal(params[0], make([(3,)])[0])


RIGHT = [
    {"max_grad_norm": 1},
    {"max_grad_norm": 0.5, "diagnostics": True},
    {"master_weights": "split", "state_dtype": torch.bfloat16},
    {"stochastic_rounding": True, "seed": 2**64 - 1, "state_dtype": torch.float32},
    {"seed": None, "state_dtype": None, "max_grad_norm": None, "master_weights": False},
]


@pytest.mark.parametrize("options", RIGHT, ids=str)
@each_kind
def test_right_options_are_taken_and_are_no_part_of_the_groups(kind, options):
    """So that a state_dict is torch's, whatever the options."""
    optimizer = kind.ours(make([(3,)]), **options)
    assert all(getattr(optimizer._step_options, name) == value for name, value in options.items())
    assert optimizer.defaults == kind.torchs(make([(3,)])).defaults
    assert optimizer.state_dict()["param_groups"] == kind.torchs(make([(3,)])).state_dict()["param_groups"]


@each_kind
def test_torchs_options_come_first(kind):
    """A wrong one of torch's is refused with torch's message, whatever else was given."""
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1"):
        kind.ours(make([(3,)]), lr=-1.0, master_weights=True)
