"""The options of ``deepops train``: what the parser takes, and which of them go together."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

from deepops.cli.errors import UserError
from deepops.cli.models import DEFAULT_DATA, MODELS, OPTIMIZERS

# Options that only some kinds of training have: their names, the kinds, and what they are unless given.
_OPTIONS: dict[str, tuple[tuple[str, ...], object]] = {
    "compare": (("train",), True),
    "optimizer": (("train", "gradient_flow"), "adam"),
    "contrast": (("gradient_flow",), True),
    "learning_rates": (("compare_optimizers",), ()),
    "label_noise": (("compare_optimizers",), (0.0, 0.2, 0.4)),
    "seeds": (("compare_optimizers",), 1),
    "target_loss": (("compare_optimizers",), 0.3),
}
_MAX_SEED = 2**32 - 1


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds "(default: ...)" to the help of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_train_options(train: argparse.ArgumentParser) -> None:
    """Give the parser of ``deepops train`` its options."""
    train.add_argument("--model", default="cnn", choices=MODELS, help="what to train")
    train.add_argument(
        "--data",
        metavar="digits|synthetic|python|PATH",
        help="scikit-learn's handwritten digits, random images, or MNIST-format IDX files (a folder, or a prefix of "
        "their paths), gzipped or not; for lstm-text the reference of the Python language, or a file (default: digits, "
        "or python)",
    )
    train.add_argument(
        "--epochs",
        type=_integer(1),
        help="passes over the training data (default: 5; with --compare-optimizers 4)",
    )
    train.add_argument("--batch-size", type=_integer(1), default=32, help="images, or pieces of a text, per step")
    train.add_argument("--optimizer", choices=OPTIMIZERS, help="which optimizer (default: adam)")
    train.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="bf16, fp16: autocast (mixed precision)"
    )
    train.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    train.add_argument("--seed", type=_integer(0, _MAX_SEED), default=0, help="split, weights, batches and dropout")
    train.add_argument("--out", metavar="DIR", help="where to write the results (default: runs/MODEL-DATA)")
    kind = train.add_mutually_exclusive_group()
    kind.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, help="train stock PyTorch beside deepops (default: yes)"
    )
    kind.add_argument(
        "--compare-optimizers",
        action="store_true",
        help="instead: train with SGD, RMSprop and Adam of deepops over learning rates and label noise, and tabulate "
        "convergence, robustness and cost; not with --optimizer",
    )
    kind.add_argument(
        "--gradient-flow",
        action="store_true",
        help="instead: measure the gradient of every layer at every step and plot it, for this model and for others "
        "in which gradients vanish or explode",
    )
    several = train.add_argument_group("with --compare-optimizers")
    several.add_argument(
        "--learning-rates",
        nargs="+",
        type=_learning_rates,
        metavar="NAME=RATE[,RATE...]",
        help="rates to try, such as  sgd=0.01,0.1 adam=0.001  (default: six per optimizer, see the table)",
    )
    several.add_argument(
        "--label-noise",
        nargs="+",
        type=_number("a number from 0 to 1", lambda value: 0 <= value <= 1),
        metavar="FRACTION",
        help="parts of the training labels that are made wrong; test labels never are (default: 0 0.2 0.4)",
    )
    several.add_argument(
        "--seeds", type=_integer(1, 100), help="repeat with so many seeds, from --seed on, and average (default: 1)"
    )
    several.add_argument(
        "--target-loss",
        type=_number("a positive number", lambda value: 0 < value < math.inf),
        metavar="LOSS",
        help="the training loss that convergence is timed to (default: 0.3)",
    )
    flow = train.add_argument_group("with --gradient-flow")
    flow.add_argument(
        "--contrast",
        action=argparse.BooleanOptionalAction,
        help="beside the model train it without batch norm, a deep sigmoid net, and a deep tanh net with large weights "
        "(default: yes)",
    )


def kind_of(arguments: argparse.Namespace) -> str:
    """Which kind of training was asked for: "train", "compare_optimizers" or "gradient_flow"."""
    return next((kind for kind in ("compare_optimizers", "gradient_flow") if getattr(arguments, kind)), "train")


def complete(arguments: argparse.Namespace) -> None:
    """Fill in the defaults of the options that only some kinds of training have.

    Raises:
        UserError: an option was given that this kind does not have, or twice what may be there once.
    """
    chosen = kind_of(arguments)
    if chosen != "train" and MODELS[arguments.model].data != "images":
        raise UserError(f"{_flag(chosen)} is for models of images, not for {arguments.model}")
    arguments.data = arguments.data or DEFAULT_DATA[MODELS[arguments.model].data]
    arguments.epochs = arguments.epochs or (4 if chosen == "compare_optimizers" else 5)
    for name, (kinds, default) in _OPTIONS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
        elif chosen not in kinds:
            why = f"needs {_flag(kinds[0])}" if chosen == "train" else f"does not go with {_flag(chosen)}"
            raise UserError(f"{_flag(name)} {why}")
    names = [name for name, _ in arguments.learning_rates]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--learning-rates: {name} is there twice")
    arguments.label_noise = sorted(set(arguments.label_noise))
    if arguments.seed + arguments.seeds - 1 > _MAX_SEED:
        raise UserError(f"--seeds {arguments.seeds}: the last seed would be above {_MAX_SEED}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _integer(minimum: int, maximum: int = 2**31 - 1) -> type[int]:
    """An argparse type: an integer within [minimum, maximum]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {minimum} to {maximum}")
        return value

    return parse  # type: ignore[return-value]  # argparse calls it; only the annotation of `type=` wants a class


def _number(what: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse type: a number that is ``allowed``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def _learning_rates(text: str) -> tuple[str, tuple[float, ...]]:
    """An argparse type: "sgd=0.01,0.1" -> ("sgd", (0.01, 0.1)), rising."""
    from deepops.cli.compare_optimizers import RULES

    name, equals, rates = text.partition("=")
    if not equals or name not in RULES:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RATE[,RATE...] with NAME one of {', '.join(RULES)}")
    parse = _number("a positive learning rate", lambda value: 0 < value < math.inf)
    return name, tuple(sorted({parse(rate) for rate in rates.split(",")}))
