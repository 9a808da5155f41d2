"""``deepops info``: what was built, what runs here, and what is missing and why."""

from __future__ import annotations

import json

from deepops._build_info import build_info


def run_info(*, as_json: bool) -> int:
    """Print ``deepops.build_info()``; always 0."""
    facts = build_info()
    if as_json:
        print(json.dumps(facts, indent=1))
        return 0
    isas = facts["cpu_isas"]
    lines = {
        "deepops": facts["version"],
        "torch built with": facts["torch_built"] or "unknown",
        "torch running on": facts["torch_running"],
        "Python": facts["python"],
        "compiler": facts["compiler"] or "unknown",
        "build type": facts["build_type"] or "unknown",
        "instruction sets compiled": ", ".join(isas["compiled"]) or "none",
        "instruction sets available": ", ".join(isas["available"]) or "none",
        "instruction set in use": isas["in_use"] or "none",
        "CUDA architectures": ", ".join(facts["cuda_archs"]) or "none",
    }
    for name, path in facts["binaries"].items():
        lines[name] = path if path is not None else f"missing: {facts['missing'][name]}"
    width = max(map(len, lines))
    for label, value in lines.items():
        print(f"{label:<{width}}  {value}")
    return 0
