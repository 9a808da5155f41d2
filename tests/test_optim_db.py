"""PyTorch's own optimizer database: every configuration gives what torch's for-loop gives, every error is torch's."""

import copy

import pytest
import torch
from optim_cases import KINDS, assert_within_the_rule, flat, make, needs_kernel, states, train_together
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

pytestmark = needs_kernel

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]
SHAPES = [(), (2, 3), (700,)]
INFOS = {str(kind): info for kind in KINDS for info in optim_db if info.optim_cls is kind.torchs}


def cases(inputs_of):
    """(kind, index of the input) for every input of the database, named by its description."""
    return [
        pytest.param(kind, index, id=f"{kind}: {getattr(x, 'optimizer_error_input', x).desc}")
        for kind in KINDS
        for index, x in enumerate(inputs_of(INFOS[str(kind)]))
    ]


def test_the_database_has_all_four():
    assert list(INFOS) == [str(kind) for kind in KINDS]
    assert all(len(info.optim_inputs_func("cpu")) >= 4 for info in INFOS.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "index"), cases(lambda info: info.optim_inputs_func("cpu")))
def test_every_configuration_is_within_the_rule(kind, index, dtype):
    """The oracle is torch's for-loop in float64."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    options = INFOS[str(kind)].optim_inputs_func("cpu", dtype)[index].kwargs
    start = make(SHAPES, dtype)
    pairs = []
    for build, own in (
        (kind.ours, dtype),
        (kind.stock, torch.float32 if dtype is torch.float64 else dtype),
        (kind.stock, wide),
    ):
        params = [torch.nn.Parameter(p.detach().to(own, copy=True)) for p in start]
        pairs.append((build(params, **copy.deepcopy(options)), params))
    train_together(pairs)
    optimizer, ours = pairs[0]
    assert "torch, because" not in optimizer._explain()
    assert_within_the_rule("param", *[flat(params) for _, params in pairs])
    for name in pairs[2][0].state.get(pairs[2][1][0]) or {}:
        if name == "step":
            assert states(optimizer, ours, name) == states(*pairs[2], name)
        else:
            assert_within_the_rule(name, *[flat(states(*pair, name)) for pair in pairs])


@pytest.mark.parametrize(("kind", "index"), cases(lambda info: info.optim_error_inputs_func("cpu", torch.float32)))
def test_every_error_is_torchs(kind, index):
    caught = []
    for build in (kind.ours, kind.torchs):
        bad = INFOS[str(kind)].optim_error_inputs_func("cpu", torch.float32)[index]
        given = bad.optimizer_error_input
        params = make([(3,)]) if given.params is None else given.params
        assert bad.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR
        expect = pytest.warns if issubclass(bad.error_type, Warning) else pytest.raises
        with expect(bad.error_type, match=bad.error_regex) as found:
            build(params, **given.kwargs)
        is_warning = expect is pytest.warns
        caught.append([str(w.message) for w in found] if is_warning else (found.type, str(found.value)))
    assert caught[0] == caught[1]
