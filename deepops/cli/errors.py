"""What goes wrong through no fault of the program: told in one line, without a traceback."""

from __future__ import annotations

import importlib

# import name -> the distribution that pip installs
_EXTRA = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}


class UserError(Exception):
    """The request cannot be carried out; the message is one line that says why and what is allowed."""


def require(*names: str) -> None:
    """Raise UserError unless all these packages of the extra ``cli`` can be imported."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(_EXTRA[name])
    if missing:
        raise UserError(
            f"needs {', '.join(missing)}: install the extra 'cli' with  pip install \".[cli]\"  in a checkout of "
            f"deepops (or: pip install {' '.join(missing)})"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type when it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
