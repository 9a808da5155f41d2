"""The ``deepops`` command: ``deepops train | info | check``.

Exit codes: 0 done; 1 ``deepops check`` found a wrong result; 2 the request cannot be carried out (a wrong option, a bad
path, an unavailable device, a missing package), told in one line on stderr; 130 stopped with Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from deepops.cli.errors import UserError

__all__ = ["main"]

INTERRUPTED = 130  # what a shell reports for a program ended by SIGINT


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


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


def _parser() -> argparse.ArgumentParser:
    from deepops import __version__
    from deepops.cli.models import MODELS, OPTIMIZERS

    parser = _Parser(prog="deepops", description="Fused training layers and optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"deepops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|info|check")

    train = commands.add_parser(
        "train",
        help="train a model twice, with stock PyTorch and with deepops, and show what was gained",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.add_argument("--model", default="cnn", choices=MODELS, help="what to train")
    train.add_argument(
        "--data",
        default="digits",
        metavar="digits|synthetic|PATH",
        help="scikit-learn's handwritten digits, random images, or MNIST-format IDX files (a folder, or a prefix of "
        "their paths), gzipped or not",
    )
    train.add_argument("--epochs", type=_integer(1), default=5, help="passes over the training images")
    train.add_argument("--batch-size", type=_integer(1), default=32, help="images per step")
    train.add_argument("--optimizer", default="adam", choices=OPTIMIZERS, help="which optimizer")
    train.add_argument(
        "--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="bf16, fp16: autocast (mixed precision)"
    )
    train.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    train.add_argument("--seed", type=_integer(0, 2**32 - 1), default=0, help="split, weights, batches and dropout")
    train.add_argument(
        "--compare", action=argparse.BooleanOptionalAction, default=True, help="train stock PyTorch beside deepops"
    )
    train.add_argument("--out", metavar="DIR", help="where to write the results (default: runs/MODEL-DATA)")

    info = commands.add_parser("info", help="what was built, what runs here, and what is missing and why")
    info.add_argument("--json", action="store_true", help="print JSON")

    check = commands.add_parser("check", help="compare every op with stock PyTorch and a float64 oracle")
    check.add_argument("--json", action="store_true", help="print JSON, one entry per case")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit code."""
    command = "deepops"
    try:
        arguments = _parser().parse_args(argv)
        command = f"deepops {arguments.command}"
        if arguments.command == "train":
            from deepops.cli.train import run_train

            return run_train(arguments)
        if arguments.command == "info":
            from deepops.cli.info import run_info

            return run_info(as_json=arguments.json)
        from deepops.cli.check import run_check

        return run_check(as_json=arguments.json)
    except SystemExit as end:  # argparse: --help, --version or a wrong option
        return end.code if isinstance(end.code, int) else 2
    except UserError as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        return INTERRUPTED
