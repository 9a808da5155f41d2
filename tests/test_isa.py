"""Instruction sets: the override, and that no machine code of one variant can run on behalf of another.

A template or inline function that two variants of a kernel file share becomes one weak symbol, and the linker keeps
either copy: AVX-512 code would then run on a machine without it. So all code of a variant must carry its namespace
(isa_baseline, isa_avx2, isa_avx512) in its name.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deepops import _library, testing

ROOT = Path(__file__).parent.parent
OPS = Path(_library.__file__).parent / "_ops.so"
needs_binutils = pytest.mark.skipif(not (shutil.which("nm") and shutil.which("objdump")), reason="binutils is missing")


def test_variants_of_this_machine():
    assert testing.isas()[0] == "baseline"
    assert testing.isas() == ["baseline", "avx2", "avx512"][: len(testing.isas())]
    assert _library._C.cpu_isa() == testing.isas()[-1], "the best one is used unless overridden"


def test_the_override_works_and_is_undone():
    before = _library._C.cpu_isa()
    for isa in testing.isas():
        with testing.use_isa(isa):
            assert _library._C.cpu_isa() == isa
        assert _library._C.cpu_isa() == before
    with pytest.raises(ZeroDivisionError), testing.use_isa("baseline"):
        _ = 1 / 0
    assert _library._C.cpu_isa() == before


def test_an_unknown_name_is_refused_and_changes_nothing():
    before = _library._C.cpu_isa()
    with pytest.raises(ValueError, match="isa: 'sse9' is not one of baseline, avx2, avx512"), testing.use_isa("sse9"):
        pass
    assert _library._C.cpu_isa() == before


@pytest.mark.skipif("avx512" in testing.isas(), reason="this machine has every instruction set")
def test_a_variant_this_machine_lacks_is_refused():
    with pytest.raises(ValueError, match="isa: this machine has no 'avx512'"), testing.use_isa("avx512"):
        pass


# ---- symbols --------------------------------------------------------------------------------------------------------


def run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def shared_symbols(object_file: Path, isa: str) -> list[str]:
    """Symbols of a variant's object that another variant's object may define, too."""
    lines = (line.split(maxsplit=2) for line in run("nm", "--defined-only", object_file).splitlines())
    symbols = [(parts[1], parts[2]) for parts in lines if len(parts) == 3]
    # Lower-case letters are local to the object, but for v, w and u: weak and unique. DW.ref.* points to a personality.
    return [
        name
        for kind, name in symbols
        if (kind.isupper() or kind in "vwu") and f"isa_{isa}" not in name and not name.startswith("DW.ref.")
    ]


def variant_objects() -> dict[tuple[str, str], Path]:
    """The newest object of each (kernel, variant) in the build folder."""
    newest: dict[tuple[str, str], Path] = {}
    folders = [path for path in ROOT.glob("build/*") if not path.name.startswith("simt-")]  # in use by other tests
    for path in itertools.chain.from_iterable(folder.glob("**/*_kernel_cpu_*.dir/**/*.o") for folder in folders):
        match = re.search(r"(\w+_kernel_cpu)_(\w+)\.dir", str(path))
        assert match
        key = (match[1], match[2])
        if key not in newest or path.stat().st_mtime > newest[key].stat().st_mtime:
            newest[key] = path
    return newest


@needs_binutils
def test_no_symbol_is_shared_between_variants():
    objects = variant_objects()
    if not objects:
        pytest.skip("no object files: an installed package; the next test looks at what was linked")
    kernels = {path.stem for path in (ROOT / "csrc").glob("*/*_kernel_cpu.cpp")}
    assert {kernel for kernel, _ in objects} >= kernels
    assert {isa for _, isa in objects} == set(_library._C.build_info()["cpu_isas"].split())
    for (kernel, isa), path in objects.items():
        if kernel in kernels:
            assert not shared_symbols(path, isa), f"{path.name} of {isa}: put these into namespace DEEPOPS_ISA"


HARMLESS_HEADERS = {"cstddef", "cstdint", "immintrin.h"}  # declarations, macros, and functions that are always inlined


def library_headers(source: Path, seen: set[Path]) -> set[tuple[str, str]]:
    """(file, header) for each <header> that ``source`` includes, itself or through our own headers."""
    seen.add(source)
    found = set()
    for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', source.read_text(), re.MULTILINE):
        if bracket == "<":
            found.add((source.name, name))
        elif (path := ROOT / "csrc" / name) not in seen:
            found |= library_headers(path, seen)
    return found


@pytest.mark.parametrize("kernel", sorted((ROOT / "csrc").glob("*/*_kernel_cpu.cpp")), ids=lambda path: path.stem)
def test_kernels_include_no_header_with_code(kernel):
    """Whether such code stays a shared symbol depends on what the compiler inlines: keep it out altogether."""
    assert not {(file, name) for file, name in library_headers(kernel, set()) if name not in HARMLESS_HEADERS}


@needs_binutils
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
@pytest.mark.parametrize("line", ["#include <algorithm>", "#include <vector>", "inline"])
def test_a_standard_header_in_a_kernel_would_be_noticed(tmp_path, line):
    """The check itself: what a kernel file must not do."""
    body = {
        "#include <algorithm>": "void f(float* p) { std::sort(p, p + 99); }",
        "#include <vector>": "float f(int n) { return std::vector<float>(n, 1.0f)[n / 2]; }",
        "inline": "inline float twice(float x) { return x + x; } float (*volatile pointer)(float) = twice;",
    }[line]
    header = line if line.startswith("#") else ""
    source, out = tmp_path / "kernel.cpp", tmp_path / "kernel.o"
    outside = body if line == "inline" else ""
    inside = "" if line == "inline" else body
    source.write_text(f"{header}\n{outside}\nnamespace isa_avx2 {{ {inside} void g() {{}} }}\n")
    # -O0: what the optimiser inlines in one compiler it may leave in another.
    run("g++", "-std=c++20", "-O0", "-mavx2", "-fvisibility=hidden", "-c", source, "-o", out)
    assert shared_symbols(out, "avx2")
    source.write_text(
        "namespace isa_avx2 { template <class T> T h(T x) { return x; } float g() { return h(1.0f); } }\n"
    )
    run("g++", "-std=c++20", "-O0", "-mavx2", "-fvisibility=hidden", "-c", source, "-o", out)
    assert not shared_symbols(out, "avx2")


def functions_with_avx(binary: Path) -> list[str]:
    """Names of the functions with VEX or EVEX instructions, which all begin with v (`verr` and `verw` aside)."""
    names, name = [], ""
    for line in run("objdump", "-d", "--no-show-raw-insn", "-j", ".text", binary).splitlines():
        if line.endswith(">:"):
            name = line[line.index("<") + 1 : -2]
        elif "\tv" in line and (not names or names[-1] != name):
            names.append(name)
    return names


@needs_binutils
def test_only_functions_of_a_variant_hold_its_instructions():
    """On the linked library: outside isa_avx2 and isa_avx512 everything runs on any x86-64."""
    names = functions_with_avx(OPS)
    if "avx512" in _library._C.build_info()["cpu_isas"]:
        assert any("isa_avx2" in name for name in names)
        assert any("isa_avx512" in name for name in names)
    strangers = [name for name in names if "isa_avx2" not in name and "isa_avx512" not in name]
    assert not strangers, f"{strangers[:5]} hold AVX instructions, but are in no namespace of a variant"


@needs_binutils
def test_the_library_has_no_python_in_it_and_needs_torch_alone():
    """One binary for every torch from 2.11 up, whatever the Python."""
    undefined = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", OPS).splitlines()]
    assert undefined
    assert not [name for name in undefined if name.startswith(("Py", "_Py"))]
    # Symbols of C++ classes of torch are no stable ABI: only its C functions are.
    assert not [name for name in undefined if re.match(r"_Z.*(2at|3c10|5torch)", name)]
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", OPS))
    allowed = (
        "libtorch_cpu.so",
        "libtorch.so",
        "libc10.so",
        "libstdc++.so",
        "libgcc_s.so",
        "libc.so",
        "libm.so",
        "ld-linux",
    )
    assert needed
    assert not [name for name in needed if not name.startswith(allowed)]


def test_without_the_extension_there_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(_library, "_C", None)
    assert testing.isas() == []
    with pytest.raises(RuntimeError, match="isa"), testing.use_isa("baseline"):
        pass
    with pytest.raises(RuntimeError, match="parallel regions"), testing.count_parallel_regions():
        pass
    monkeypatch.undo()


def test_the_environment_is_the_one_under_test():
    """A test run against a stale copy of the package elsewhere would prove nothing."""
    assert "deepops" in sys.modules
    assert OPS.exists(), _library.binaries()["_ops"]
