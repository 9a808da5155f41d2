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


def _parser() -> argparse.ArgumentParser:
    from deepops import __version__
    from deepops.cli.train_options import Help, add_train_options

    parser = _Parser(prog="deepops", description="Fused training layers and optimizers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"deepops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train|info|check")

    train = commands.add_parser(
        "train",
        help="train a model twice, with stock PyTorch and with deepops, and show what was gained; or compare "
        "optimizers, or plot the gradients of every layer",
        formatter_class=Help,
    )
    add_train_options(train)

    info = commands.add_parser("info", help="what was built, what runs here, and what is missing and why")
    info.add_argument("--json", action="store_true", help="print JSON")

    check = commands.add_parser("check", help="compare every op with stock PyTorch and a float64 oracle")
    check.add_argument("--json", action="store_true", help="print JSON, one entry per case")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    from deepops.cli.train_options import complete, kind_of

    complete(arguments)
    kind = kind_of(arguments)
    if kind == "compare_optimizers":
        from deepops.cli.compare_optimizers import run_compare_optimizers

        return run_compare_optimizers(arguments)
    if kind == "gradient_flow":
        from deepops.cli.gradient_flow import run_gradient_flow

        return run_gradient_flow(arguments)
    from deepops.cli.train import run_train

    return run_train(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: ``sys.argv[1:]``) and return its exit code."""
    command = "deepops"
    try:
        arguments = _parser().parse_args(argv)
        command = f"deepops {arguments.command}"
        if arguments.command == "train":
            return _train(arguments)
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
