"""Moving between models of stock layers and models with deepops layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from deepops.nn._activation import _NAMES
from deepops.nn.conv_bn_act import ConvBNAct1d, ConvBNAct2d, ConvBNAct3d, _ConvBNAct
from deepops.nn.lstm import LSTM
from deepops.nn.lstm_cell import LSTMCell

_BLOCKS: tuple[type[_ConvBNAct], ...] = (ConvBNAct1d, ConvBNAct2d, ConvBNAct3d)


def map_state_dict(
    state_dict: Mapping[str, Any],
    source: nn.Module,
    target: nn.Module,
    rename: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Rename the entries of a checkpoint of ``source`` so that ``target`` loads them. Works in both directions.

    The two models hold the same layers in the same order, some of them inside another block: ``features.0.weight`` of a
    stock model is ``features.0.conv.weight`` of one with ``ConvBNAct2d``. Entries are paired in order; each pair must
    agree in its last name (``weight``, ``running_mean``, ...) and its shape.

    Args:
        state_dict: checkpoint of ``source``.
        source: model that the checkpoint fits.
        target: model that is to load it.
        rename: ``{module of source: module of target}`` for layers whose order differs, for example
            ``{"conv1": "block1.conv", "bn1": "block1.bn"}``. All entries below these modules follow it.

    Returns:
        A new dictionary with the very tensors of ``state_dict``.

    Raises:
        ValueError: the checkpoint does not fit ``source``, or the two models do not correspond; the first entry that
            does not is named.

    >>> stock = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    >>> ours = nn.Sequential(ConvBNAct2d(1, 4, 3, bias=True), nn.Flatten())
    >>> list(map_state_dict(stock.state_dict(), stock, ours))[:3]
    ['0.conv.weight', '0.conv.bias', '0.bn.weight']
    """
    names = _corresponding_names(source.state_dict(), target.state_dict(), rename or {})
    missing = [name for name in names if name not in state_dict]
    unexpected = [name for name in state_dict if name not in names]
    if missing or unexpected:
        raise ValueError(f"state_dict: does not fit source: missing {missing}, unexpected {unexpected}")
    return {names[name]: value for name, value in state_dict.items()}


def _corresponding_names(
    source: Mapping[str, Any], target: Mapping[str, Any], rename: Mapping[str, str]
) -> dict[str, str]:
    names = {}
    for old, new in rename.items():
        below = [name for name in source if name.startswith(f"{old}.")]
        if not below:
            raise ValueError(f"rename: source has no entries below {old!r}")
        names.update({name: new + name[len(old) :] for name in below})
    for name in names.values():
        if name not in target:
            raise ValueError(f"rename: target has no entry {name!r}")
    renamed = set(names.values())
    rest_of_source = [name for name in source if name not in names]
    rest_of_target = [name for name in target if name not in renamed]
    if len(rest_of_source) != len(rest_of_target):
        raise ValueError(
            f"target: expected {len(rest_of_source)} entries, as many as source has, got {len(rest_of_target)}"
        )
    names.update(zip(rest_of_source, rest_of_target, strict=True))
    for old, new in names.items():
        shapes = [tuple(entry.shape) if isinstance(entry, Tensor) else None for entry in (source[old], target[new])]
        if old.rpartition(".")[2] != new.rpartition(".")[2] or shapes[0] != shapes[1]:
            raise ValueError(f"target: {new} {shapes[1]} does not correspond to source's {old} {shapes[0]}")
    return {name: names[name] for name in source}


def swap_layers(model: nn.Module) -> list[str]:
    """Replace ``conv, bn[, act]`` runs in every ``nn.Sequential`` of ``model``, and every LSTM in it, in place.

    ``ConvBNAct*`` takes the place of the convolution and shares its parameters (an optimizer made before stays right);
    ``nn.Identity`` takes the other places, so that indices do not shift. ``LSTM`` and ``LSTMCell`` take the places of
    ``nn.LSTM`` and ``nn.LSTMCell``, wherever they are, and share their parameters too. Left alone: modules of other
    classes, used more than once, or with hooks, and ``model`` itself; a run that ends without one of the seven
    activations becomes a block with the identity.

    Returns:
        The names of the layers made.

    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))
    >>> swap_layers(model)
    ['0']
    >>> type(model[0]).__name__, type(model[1]).__name__
    ('ConvBNAct2d', 'Identity')
    """
    places: dict[int, int] = {}
    for module in model.modules():  # visits each module once: counts the places that hold it
        for child in module._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    swapped = []
    for prefix, module in list(model.named_modules()):
        swapped += _swap_lstms(prefix, module, places)
        if type(module) is not nn.Sequential:
            continue
        keys = list(module._modules)
        for at, key in enumerate(keys[:-1]):
            conv: Any = module._modules[key]
            bn: Any = module._modules[keys[at + 1]]
            act = module._modules[keys[at + 2]] if at + 2 < len(keys) else None
            block = next((kind for kind in _BLOCKS if type(conv) is kind._conv_class), None)
            if block is None or not (_is_free(conv, type(conv), places) and _is_free(bn, block._bn_class, places)):
                continue
            if bn.num_features != conv.out_channels:
                continue
            takes_act = act is not None and type(act) in _NAMES and _is_free(act, type(act), places)
            module._modules[key] = block.from_modules(conv, bn, act if takes_act else None)
            module._modules[keys[at + 1]] = nn.Identity()
            if takes_act:
                module._modules[keys[at + 2]] = nn.Identity()
            swapped.append(f"{prefix}.{key}" if prefix else key)
    return swapped


def _swap_lstms(prefix: str, module: nn.Module, places: Mapping[int, int]) -> list[str]:
    """Replace the LSTMs that ``module`` holds; the names of those replaced."""
    swapped = []
    for key, child in list(module._modules.items()):
        new: nn.Module
        if isinstance(child, nn.LSTM) and _is_free(child, nn.LSTM, places):
            new = LSTM.from_module(child)
        elif isinstance(child, nn.LSTMCell) and _is_free(child, nn.LSTMCell, places):
            new = LSTMCell.from_module(child)
        else:
            continue
        module._modules[key] = new
        swapped.append(f"{prefix}.{key}" if prefix else key)
    return swapped


def _is_free(module: nn.Module | None, kind: type[nn.Module], places: Mapping[int, int]) -> bool:
    """Whether ``module`` is exactly of this class, held in one place, and without hooks or an own ``forward``."""
    if module is None or type(module) is not kind or places[id(module)] != 1 or "forward" in module.__dict__:
        return False
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
