"""Finds raw CUDA in ``csrc``: kernels may use nothing but what ``core/gpu.cuh`` and ``core/tensor_core.cuh`` have.

There are two reasons, given in the first of them.

``python tests/cuda_gate/lint.py [file...]`` looks at all of ``csrc`` by default and prints ``file:line: what``.

Constructs are found in every file. Dereferences are found in functions for the device (``DEEPOPS_KERNEL``,
``DEEPOPS_DEVICE``, ``DEEPOPS_HD``) of ``.cu`` and ``.cuh`` files: ``*p`` of anything, ``p[i]`` and ``p->x`` of names
declared as pointers in that function, and of members declared as pointers in that file. ``p[i]`` of a pointer that is
``auto``, or of an alias' type, or a member declared elsewhere, is not seen.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CSRC = Path(__file__).parent.parent.parent / "csrc"
PORTABILITY = ("core/gpu.cuh", "core/tensor_core.cuh")  # may do everything
DECORATED = "core/host_device.h"  # functions for host and device: may say so, and nothing else

CONSTRUCTS = {
    r"\b__(global|device|host|constant|managed|forceinline|launch_bounds)__": "DEEPOPS_KERNEL, DEEPOPS_DEVICE",
    r"\b__shared__": "DEEPOPS_SHARED",
    r"\b(asm|__asm__)\b": "a function in core/gpu.cuh or core/tensor_core.cuh",
    r"\b__(shfl\w*|ballot\w*|any_sync|all_sync|activemask|match_\w+|reduce_\w+_sync)": "gpu::shuffle, gpu::ballot",
    r"\b__(sync\w+|threadfence\w*|nanosleep)": "gpu::barrier, gpu::warp_barrier, gpu::fence",
    r"\b__(ld|st)(g|c[agsv]|lu|w[bt])\s*\(": "gpu::load, gpu::load_fresh, gpu::store",
    r"\batomic[A-Z]\w*\s*\(": "gpu::atomic_add (integers: floats would be summed in no fixed order)",
    r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize)\b": "gpu::thread, gpu::block, gpu::blocks",
    r"<<<": "gpu::launch",
    r"\bcu(da)?[A-Z]\w*": "a function in core/gpu.cuh",
    r"#\s*include\s*<(cu\w*|cooperative_groups|mma)(\.h|/)": "core/gpu.cuh",
    r"\b(__CUDACC__|__CUDA_ARCH__)\b": "DEEPOPS_GPU",
}  # fmt: skip
# What a template of DEEPOPS_HD functions needs so that nvcc does not warn; it is not there for g++, and no code.
NO_CODE = ("#ifdef __CUDACC__\n#pragma nv_exec_check_disable\n#endif", "\n\n")
DEVICE_FUNCTION = re.compile(r"\bDEEPOPS_(?:KERNEL\s*\([^)]*\)|DEVICE\b|HD\b)")
# clang-format writes `T* name`, `a * b` and `*p`, which tells the three apart.
POINTER = re.compile(
    r"(?:[\w>]\*|[\w>,] \*(?=\w))(?:\s*\*)*\s*(?:const\s+|__restrict__\s+|DEEPOPS_RESTRICT\s+)*(\w+)\s*(?=[,;=)({\[])"
)


def without_comments(text: str) -> str:
    """The same with comments and the contents of strings blanked out; every character keeps its place."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def block_end(text: str, start: int) -> int:
    """Where the block of the first brace from ``start`` on ends; where a declaration has none, its semicolon."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == ";" and depth == 0:
            return i
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            return i
    return len(text)


def constructs(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Places of raw CUDA in a file, with what to use."""
    for pattern, instead in CONSTRUCTS.items():
        if name == DECORATED and ("global|device" in pattern or "CUDACC" in pattern):
            continue
        for match in re.finditer(pattern, text):
            yield match.start(), f"{match[0].strip()}: use {instead}"


def any_of(names: Sequence[str]) -> str:
    """A pattern that matches these words, or nothing when there are none."""
    return "|".join(sorted(set(names))) or "(?!)"


def dereferences(text: str) -> Iterator[tuple[int, str]]:
    """Places in device functions where a pointer is followed without the helpers."""
    spans = [(match.start(), block_end(text, match.end())) for match in DEVICE_FUNCTION.finditer(text)]
    outside, last = "", 0
    for start, end in spans:
        outside, last = outside + text[last:start], max(last, end)
    members = any_of(POINTER.findall(outside + text[last:]))
    for start, end in spans:
        own = any_of(POINTER.findall(text[start:end]))
        followed = rf"(?<![\w>*&])\*+(?=[\w(])|(?<![.\w>])({own})\s*(?:\[|->)|(?:\.|->)({members})\s*(?:\[|->)"
        for match in re.compile(followed).finditer(text, start, end):
            if re.search(r"(?<!&)&(\w+(\.|->))*\w*$", text[start : match.start()]):
                continue  # an address: `&p[i]`, `&s.p->x`
            yield match.start(), f"{match[1] or match[2] or 'a pointer'} is followed: use gpu::load, gpu::store"


def findings(path: Path, root: Path = CSRC) -> list[str]:
    """``file:line: what`` for each."""
    name = path.relative_to(root).as_posix()
    if name in PORTABILITY:
        return []
    text = without_comments(path.read_text()).replace(*NO_CODE)
    found = set(constructs(name, text))
    if path.suffix in (".cu", ".cuh"):
        found |= set(dereferences(text))
    lines = ((text.count("\n", 0, place) + 1, what) for place, what in sorted(found))
    return [f"{root.name}/{name}:{line}: {what}" for line, what in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at the given files, or at all. Returns 1 when something was found."""
    chosen = [Path(name).resolve() for name in (sys.argv[1:] if arguments is None else arguments)]
    files = chosen or sorted(p for p in CSRC.rglob("*") if p.suffix in (".cu", ".cuh", ".h", ".cpp"))
    found = [line for path in files for line in findings(path)]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
