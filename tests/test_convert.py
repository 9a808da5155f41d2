"""Checkpoints and models, to and from deepops layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from deepops.nn import ConvBNAct2d
from deepops.nn.convert import map_state_dict, swap_layers


class CourseCNN(nn.Module):
    """The network of the course module, with or without fused blocks."""

    def __init__(self, fused: bool) -> None:
        super().__init__()

        def block(i: int, o: int) -> list[nn.Module]:
            if fused:
                return [ConvBNAct2d(i, o, 3, padding=1, bias=True)]
            return [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]

        self.features = nn.Sequential(*block(1, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x))


def trained(model: nn.Module) -> nn.Module:
    """With statistics that are not the initial ones."""
    torch.manual_seed(0)
    model.train()
    model(torch.randn(4, 1, 28, 28))
    return model.eval()


@pytest.mark.parametrize("fused_first", [False, True])
def test_checkpoints_of_the_course_cnn_both_ways(fused_first: bool) -> None:
    source, target = trained(CourseCNN(fused_first)), CourseCNN(not fused_first).eval()
    checkpoint = source.state_dict()
    mapped = map_state_dict(checkpoint, source, target)
    assert set(mapped) == set(target.state_dict())
    assert ("features.0.conv.weight" in mapped) != fused_first
    target.load_state_dict(mapped)
    x = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(target(x), source(x))
    back = map_state_dict(target.state_dict(), target, source)
    assert list(back) == list(checkpoint)
    assert all(torch.equal(back[name], checkpoint[name]) for name in checkpoint)


def test_tensors_are_passed_on_not_copied() -> None:
    source, target = CourseCNN(False), CourseCNN(True)
    checkpoint = source.state_dict()
    mapped = map_state_dict(checkpoint, source, target)
    assert [t.data_ptr() for t in mapped.values()] == [t.data_ptr() for t in checkpoint.values()]


class ConvolutionsFirst(nn.Module):
    """Registers its layers in another order than a fused model does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2 = ConvBNAct2d(1, 4, 3, bias=True), ConvBNAct2d(4, 4, 3, bias=True)


def test_rename() -> None:
    source, target = ConvolutionsFirst(), Blocks()
    with pytest.raises(ValueError, match=r"block1.bn.weight \(4,\) does not correspond to source's conv2.weight"):
        map_state_dict(source.state_dict(), source, target)
    names = {"conv1": "block1.conv", "bn1": "block1.bn", "conv2": "block2.conv", "bn2": "block2.bn"}
    mapped = map_state_dict(source.state_dict(), source, target, names)
    assert torch.equal(mapped["block2.conv.weight"], source.conv2.weight)
    target.load_state_dict(mapped)
    back = map_state_dict(target.state_dict(), target, source, {new: old for old, new in names.items()})
    source.load_state_dict(back)
    with pytest.raises(ValueError, match="rename: source has no entries below 'conv9'"):
        map_state_dict(source.state_dict(), source, target, {"conv9": "block1.conv"})
    with pytest.raises(ValueError, match=r"rename: target has no entry 'block9.weight'"):
        map_state_dict(source.state_dict(), source, target, {"conv1": "block9"})


def test_models_that_do_not_correspond() -> None:
    source, target = CourseCNN(False), CourseCNN(True)
    incomplete = dict(source.state_dict())
    incomplete["more"] = incomplete.pop("features.0.bias")
    with pytest.raises(ValueError, match=r"missing \['features.0.bias'\], unexpected \['more'\]"):
        map_state_dict(incomplete, source, target)
    with pytest.raises(ValueError, match="target: expected 18 entries, as many as source has, got 2"):
        map_state_dict(source.state_dict(), source, nn.Linear(2, 2))
    target.features[0] = ConvBNAct2d(1, 16, 3, bias=True)
    with pytest.raises(ValueError, match=r"features.0.conv.weight \(16, 1, 3, 3\) does not correspond"):
        map_state_dict(source.state_dict(), source, target)


def test_swap_layers_of_the_course_cnn() -> None:
    stock = trained(CourseCNN(False))
    model = copy.deepcopy(stock)
    parameters = list(model.parameters())
    assert swap_layers(model) == ["features.0", "features.4"]
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [type(layer).__name__ for layer in model.features[:4]] == [
        "ConvBNAct2d",
        "Identity",
        "Identity",
        "MaxPool2d",
    ]
    x = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(model(x), stock(x))
    for network in (stock, model):
        torch.manual_seed(1)
        network.train()
        network(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-3
    stock.load_state_dict(map_state_dict(model.state_dict(), model, stock))


def test_swap_layers_leaves_alone() -> None:
    def chain() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    hooked = chain()
    hooked[1].register_forward_hook(lambda *_: None)
    shared = nn.Sequential(chain(), nn.Sequential())
    shared[1].append(shared[0][0])
    other = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())
    wrong = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(5), nn.ReLU())
    subclass = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SyncBatchNorm(4))
    for model in (hooked, shared, other, wrong, subclass, nn.Linear(2, 2)):
        before = repr(model)
        assert swap_layers(model) == []
        assert repr(model) == before


def test_swap_layers_without_a_known_activation() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    assert swap_layers(model) == ["0", "3"]
    assert model[0].activation == model[3].activation == "identity"
    assert isinstance(model[2], nn.Tanh)


def test_swap_layers_with_a_shared_activation() -> None:
    """One ReLU module in two places is common; the second place must keep it."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), relu, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), relu)
    assert swap_layers(model) == ["0", "3"]
    assert model[2] is relu
    assert model[5] is relu
    assert model[0].activation == "identity"


@pytest.mark.parametrize("dims", [1, 3])
def test_swap_layers_in_one_and_three_dimensions(dims: int) -> None:
    conv, bn = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))
    other = nn.BatchNorm2d(4)
    stock = nn.Sequential(conv(2, 4, 3), bn(4), nn.SiLU(), conv(4, 4, 1), other)
    model = copy.deepcopy(stock)
    assert swap_layers(model) == ["0"]  # the second pair does not go together
    assert type(model[0]).__name__ == f"ConvBNAct{dims}d"
    x = torch.randn(4, 2, *[6] * dims)
    torch.testing.assert_close(model[:4](x), stock[:4](x))
    stock.load_state_dict(map_state_dict(model.state_dict(), model, stock))
