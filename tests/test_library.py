"""Every op of the ``deepops`` namespace is complete: kernels, fake, reference, tests, benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import cpu_only
import gpu_only
import pytest
import torch

from deepops import functional, optim
from deepops._library import has_kernel

ROOT = Path(__file__).parent.parent
if not (ROOT / "csrc").exists():
    pytest.skip("needs the source tree", allow_module_level=True)
# Importing these registers the fakes.
assert functional
assert optim


def schemas() -> dict[str, torch._C.FunctionSchema]:
    """Schemas by op name. Ops that begin with an underscore are private: a step of the public op of their file."""
    names = {schema.name.removeprefix("deepops::"): schema for schema in torch._C._jit_get_all_schemas()
             if schema.name.startswith("deepops::")}  # fmt: skip
    return {name: schema for name, schema in sorted(names.items()) if not name.startswith("_")}


def family(op: str) -> str:
    """The longest kernel file name that ``op`` is or begins with: batch_norm_act for batch_norm_act_train."""
    stems = [path.stem for path in (ROOT / "csrc").glob("*/*_kernel_cpu.cpp")]
    families = [*(stem.removesuffix("_kernel_cpu") for stem in stems), *gpu_only.FAMILIES]
    return max((f for f in families if op == f or op.startswith(f + "_")), key=len, default="")


def missing(op: str) -> list[str]:
    """What ``op`` lacks."""
    stem = family(op)
    if not stem:
        return [f"csrc/<folder>/<family>_kernel_cpu.cpp whose name begins {op}"]
    folder = next((ROOT / "csrc").glob(f"*/{stem}.h")).parent.name
    lacks = [] if has_kernel(op, "cpu") or gpu_only.is_gpu_only(op) else ["a CPU kernel"]
    texts = [path.read_text() for path in (ROOT / "csrc").glob(f"*/{stem}_cuda.cu")]
    if not cpu_only.is_cpu_only(op) and not any(f'm.impl("{op}"' in text for text in texts):
        lacks.append(f"a CUDA kernel (csrc/<folder>/{stem}_cuda.cu)")
    lacks += [] if has_kernel(op, "meta") else ["a fake (torch.library.register_fake)"]
    lacks += [] if (ROOT / f"deepops/reference/{stem}.py").exists() else [f"deepops/reference/{stem}.py"]
    # The ops of one folder may share their tests and their benchmark.
    for pattern in ("tests/test_{}*.py", "benchmarks/bench_{}.py"):
        names = [pattern.format(name) for name in dict.fromkeys((stem, folder))]
        lacks += [] if any(list(ROOT.glob(name)) for name in names) else [" or ".join(names)]
    if not any(re.search(rf"\b{op}\b", path.read_text()) for path in (ROOT / "tests").glob("*.py")):
        lacks.append("a test that names it")
    return lacks


def test_the_schemas_of_library_cpp_are_registered():
    text = re.sub(r'"\s*"', "", (ROOT / "csrc/library.cpp").read_text())
    written = set(re.findall(r'm\.def\(\s*"(\w+)\(', text))
    assert {"batch_norm_act_train", "batch_norm_act_eval", "batch_norm_act_backward"} <= written
    assert {name for name in written if not name.startswith("_")} == set(schemas())


@pytest.mark.parametrize("op", schemas())
def test_every_op_is_complete(op):
    assert not missing(op), f"{op} lacks: {', '.join(missing(op))}"


def test_what_is_for_the_cpu_alone_has_no_cuda_kernel():
    """The table and the build say the same."""
    text = (ROOT / "CMakeLists.txt").read_text()
    assert set(re.findall(r"deepops_add_op\((\w+)[^)]* CPU_ONLY\)", text)) == cpu_only.FAMILIES
    assert not [stem for stem in cpu_only.FAMILIES if list((ROOT / "csrc").glob(f"*/{stem}_cuda.cu"))]


def test_what_is_for_the_gpu_alone_has_no_cpu_kernel():
    text = (ROOT / "CMakeLists.txt").read_text()
    assert set(re.findall(r"deepops_add_op\((\w+)[^)]* GPU_ONLY\)", text)) == gpu_only.FAMILIES
    assert not [stem for stem in gpu_only.FAMILIES if list((ROOT / "csrc").glob(f"*/{stem}_kernel_cpu.cpp"))]
    assert not [op for op in schemas() if gpu_only.is_gpu_only(op) and has_kernel(op, "cpu")]


def test_an_incomplete_op_is_noticed():
    library = torch.library.Library("deepops", "FRAGMENT")
    library.define("batch_norm_act_forgotten(Tensor x) -> Tensor")
    try:
        lacks = missing("batch_norm_act_forgotten")
        assert "a CPU kernel" in lacks
        assert "a CUDA kernel (csrc/<folder>/batch_norm_act_cuda.cu)" in lacks
        assert "a fake (torch.library.register_fake)" in lacks
        assert missing("nowhere_to_be_found")
    finally:
        library._destroy()


@pytest.mark.parametrize("path", sorted((ROOT / "deepops/reference").glob("*.py")), ids=lambda path: path.name)
def test_references_do_not_call_the_ops(path):
    """They are the oracle: independent of what they judge."""
    text = path.read_text()
    assert "torch.ops" not in text
    assert "deepops.functional" not in text
    assert not re.search(r"from deepops(\.(?!reference)| import (?!reference))", text)


@pytest.mark.parametrize("op", schemas())
def test_tensors_come_before_options(op):
    """The convention of library.cpp, which callers rely on when they pass by position."""
    tensor_like = [("Tensor" in str(argument.type)) for argument in schemas()[op].arguments]
    assert tensor_like == sorted(tensor_like, reverse=True)
