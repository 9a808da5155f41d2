"""Facts about this build of deepops and what of it runs here."""

from __future__ import annotations

import platform
from typing import Any

import torch

from deepops import _library


def build_info() -> dict[str, Any]:
    """What was built, what this machine can run of it, and what is missing.

    Returns:
        A dict that ``json.dumps`` accepts:

        - ``version``: of deepops;
        - ``torch_built``, ``torch_running``: the torch of the build (None when unknown) and of this process;
        - ``python``: of this process;
        - ``compiler``, ``build_type``: of the build, None when unknown;
        - ``cpu_isas``: ``compiled`` and ``available`` (on this machine) instruction sets, weakest first, and the one
          ``in_use`` (None without kernels);
        - ``cuda_archs``: GPU architectures that the CUDA kernels were compiled for;
        - ``binaries``: name -> path, None when it is missing;
        - ``missing``: name -> why.

    Example:
        >>> import deepops
        >>> deepops.build_info()["torch_running"] == torch.__version__
        True
    """
    from deepops import __version__

    built = _library._C.build_info() if _library._C is not None else {}
    missing = dict(_library._MISSING)
    return {
        "version": __version__,
        "torch_built": built.get("torch"),
        "torch_running": str(torch.__version__),
        "python": platform.python_version(),
        "compiler": built.get("compiler"),
        "build_type": built.get("build_type"),
        "cpu_isas": {"compiled": built.get("cpu_isas", "").split(), **_isas_here()},
        "cuda_archs": built.get("cuda_archs", "").split(),
        "binaries": {name: None if name in missing else found for name, found in _library.binaries().items()},
        "missing": missing,
    }


def _isas_here() -> dict[str, Any]:
    if _library._C is None or "_ops" in _library._MISSING:
        return {"available": [], "in_use": None}
    return {"available": _library._C.cpu_isas(), "in_use": _library._C.cpu_isa()}
