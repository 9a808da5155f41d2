"""The static gate and the lint notice what they are there for. Planted kernels: one architecture, no torch header."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from cuda_gate import compiled, gate, lint
from cuda_gate.compiled import Kernel, Key
from cuda_gate.gate import Budget

if not compiled.CSRC.exists():
    pytest.skip("needs the source tree", allow_module_level=True)
needs_compiler = pytest.mark.skipif(
    not (compiled.find_tool("nvcc") and compiled.find_tool("nvdisasm")),
    reason="there is no nvcc or no nvdisasm: make cuda",
)

# ---- the gate --------------------------------------------------------------------------------------------------------

FINE = Kernel(threads=256, registers=30, stack=0, spills=0, shared=0, loads_16=2, loads_narrow=1, stores_16=1,
              stores_narrow=1, inexact=(), blocks_per_sm=8)  # fmt: skip
LIMITS = Budget(registers=32, blocks_per_sm=8, stack=0, loads_16=2, loads_narrow=1, stores_16=1, stores_narrow=1)
KEY = Key("batch_norm_act/batch_norm_act_cuda.cu", "forward<float>", 80)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registers": 33}, "33 registers, budget 32"),
        ({"blocks_per_sm": 7}, "7 blocks per multiprocessor, budget 8"),
        ({"stack": 8}, "8 bytes of stack, budget 0"),
        ({"spills": 4}, "spills registers: 4 bytes"),
        ({"loads_16": 1}, "1 16-byte loads, budget 2"),
        ({"stores_16": 0}, "0 16-byte stores, budget 1"),
        ({"loads_narrow": 2}, "2 loads narrower than 16 bytes, budget 1"),
        ({"stores_narrow": 9}, "9 stores narrower than 16 bytes, budget 1"),
        ({"threads": 0}, "has no launch bounds: declare it with DEEPOPS_KERNEL(threads)"),
    ],
)
def test_each_limit_is_checked(change: dict[str, int], words: str) -> None:
    assert gate.judge({KEY: FINE}, {KEY: LIMITS}) == []
    where = "csrc/batch_norm_act/batch_norm_act_cuda.cu: forward<float> on sm_80"
    assert gate.judge({KEY: dataclasses.replace(FINE, **change)}, {KEY: LIMITS}) == [f"{where}: {words}"]


def test_exactness_is_asked_of_optimizers() -> None:
    kernel = dataclasses.replace(FINE, inexact=("fma.rn.f32",))
    assert gate.judge({KEY: kernel}, {KEY: LIMITS}) == []
    key = dataclasses.replace(KEY, file="optim/adam_cuda.cu")
    (line,) = gate.judge({key: kernel}, {key: LIMITS})
    assert line.endswith("must round as the CPU does, but has fma.rn.f32")


def test_tensor_cores_are_used_where_they_should_be() -> None:
    tile = "Tile<128, 64, 64, 32, 4, 3>"
    key = Key("conv_bn_act/conv_bn_act_cuda.cu", f"implicit_gemm<Half, {tile}, (ConvResult)0, true>", 80)
    kernel = dataclasses.replace(FINE, tensor_core=("HMMA", "LDGSTS"))
    (line,) = gate.judge({key: kernel}, {key: LIMITS})
    assert line.endswith("has no LDSM")
    older = dataclasses.replace(key, arch=75)
    assert gate.judge({older: FINE}, {older: LIMITS}) == []
    assert compiled.dynamic_shared(key.kernel) == 4 * (128 + 64) * 64
    assert compiled.dynamic_shared("direct_convolution<float, (ConvResult)0>") == 41600
    assert compiled.dynamic_shared("forward<float>") == 0


def test_instructions_of_tensor_cores_are_found() -> None:
    sass = """
\t.section .text.k,"ax",@progbits
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R4], [R8.64], P4 ;
        /*0020*/              @!P6 LDSM.16.M88.4 R8, [R10] ;
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0040*/                   LDG.E.128 R4, [R2.64] ;
"""
    assert compiled.accesses(sass) == {"k": {"loads_16": 2, "LDGSTS": 1, "LDSM": 1, "HMMA": 1}}


def test_budget_and_kernels_must_match() -> None:
    other = dataclasses.replace(KEY, kernel="gone<float>")
    forward, gone = gate.judge({KEY: FINE}, {other: LIMITS})
    assert "forward<float> on sm_80: has no line in the budget" in forward
    assert "gone<float> on sm_80: in the budget, but there is no such kernel" in gone


def test_update_does_not_write_off_a_stack_or_the_last_wide_access(tmp_path: Path) -> None:
    worse = dataclasses.replace(FINE, registers=57, stack=16, loads_16=0, stores_16=3)
    new = gate.updated(worse, LIMITS)
    assert new == dataclasses.replace(LIMITS, registers=64, stores_16=3)
    assert len(gate.violations(KEY, worse, new)) == 2
    gate.write_budget({KEY: new}, tmp_path / "budget.csv")
    assert gate.read_budget(tmp_path / "budget.csv") == {KEY: new}


def test_short_names() -> None:
    long = "void deepops::isa_gpu::(anonymous namespace)::adam<deepops::core::Half, (bool)1>(deepops::Plan<float>, int)"
    assert compiled.short_name(long) == "adam<Half, (bool)1>"
    assert compiled.short_name("reduce(float*)") == "reduce"


PLANTED = {
    "fine": ("p[i] = q[i];", "int4", set()),
    "narrow": ("p[i] = q[i];", "float", {"0 16-byte loads, budget 1", "0 16-byte stores, budget 1",
                                         "1 loads narrower than 16 bytes, budget 0",
                                         "1 stores narrower than 16 bytes, budget 0"}),
    "fma": ("p[i].x = __float_as_int(fmaf(__int_as_float(q[i].x), 3.0f, 1.0f));", "int4", {
        "must round as the CPU does, but has fma.rn.f32"}),
    "approximate": ("p[i].x = __float_as_int(__fdividef(__int_as_float(q[i].x), 3.0f));", "int4", {
        "must round as the CPU does, but has div.approx.f32"}),
    "registers": ("int4 a[24]; _Pragma(\"unroll\") for (int j = 0; j < 24; ++j) a[j] = q[i + j * n];"
                  "__syncthreads(); _Pragma(\"unroll\") for (int j = 0; j < 24; ++j) p[i + j * n] = a[j];",
                  "int4", {"registers, budget", "blocks per multiprocessor, budget"}),
}  # fmt: skip


@needs_compiler
def test_planted_kernels_are_caught(tmp_path: Path) -> None:
    """One file with all of them; the budget is that of a kernel that copies 16 bytes."""
    text = "namespace planted {\n"
    for name, (body, kind, _) in PLANTED.items():
        text += f"__global__ void __launch_bounds__(256) {name}({kind}* p, const {kind}* q, int n) {{\n"
        text += f"  const int i = blockIdx.x * 256 + threadIdx.x;\n  {body}\n}}\n"
    # Spills: more live values than 1024 threads leave registers for; a stack: an array with an index known late.
    text += "__global__ void __launch_bounds__(1024) spills(float* p, int n) {\n  float a[96];\n"
    text += '  _Pragma("unroll") for (int j = 0; j < 96; ++j) a[j] = p[j * n];\n  __syncthreads();\n'
    text += '  _Pragma("unroll") for (int j = 0; j < 96; ++j) p[j * n + 1] = a[95 - j];\n}\n'
    text += "__global__ void __launch_bounds__(256) stack(int* p, int n) {\n  int a[32];\n"
    text += "  for (int j = 0; j < 32; ++j) a[p[j] & 31] = j;\n  p[n] = a[n & 31];\n}\n"
    text += "}\n"
    (tmp_path / "optim").mkdir()
    source = tmp_path / "optim" / "planted_cuda.cu"
    source.write_text(text)
    kernels = compiled.measure([source], [80], tmp_path)
    assert {key.kernel for key in kernels} == {*PLANTED, "spills", "stack"}
    limits = Budget(registers=24, blocks_per_sm=8, stack=0, loads_16=1, loads_narrow=0, stores_16=1, stores_narrow=0)
    for key, kernel in kernels.items():
        wrong = gate.violations(key, kernel, limits)
        if key.kernel == "spills":
            assert any(line.startswith("spills registers: ") for line in wrong), wrong
        elif key.kernel == "stack":
            assert "128 bytes of stack, budget 0" in wrong
        else:
            expected = PLANTED[key.kernel][2]
            found = {line for line in wrong if not (key.kernel in ("fma", "approximate") and "budget" in line)}
            assert len(found) == len(expected), found
            assert all(any(words in line for line in found) for words in expected), found


def test_instructions_that_round_otherwise_are_found() -> None:
    """Without .rn a driver may contract when it compiles the PTX for a newer GPU."""
    lines = {"mul.rn.f32": False, "add.rn.f64": False, "mul.lo.s32": False, "mad.lo.s32": False, "div.rn.f32": False,
             "sqrt.rn.f32": False, "add.s64": False, "fma.rn.f32": True, "mul.f32": True, "add.f64": True,
             "mad.rn.f32": True, "div.full.f32": True, "rcp.approx.ftz.f32": True, "add.rn.ftz.f32": True}  # fmt: skip
    for instruction, found in lines.items():
        ptx = f".visible .entry kernel(\n)\n{{\n\t{instruction} \t%a, %b, %c;\n}}\n"
        assert compiled.ptx_facts(ptx)["kernel"][1] == ((instruction,) if found else ()), instruction


@needs_compiler
def test_occupancy_follows_registers_and_shared_memory() -> None:
    """Against the occupancy tables of the CUDA C++ programming guide."""
    key = dataclasses.replace(KEY, kernel="k")
    variants = [{"registers": 32}, {"registers": 64}, {"registers": 65}, {"shared": 40 * 1024}, {"threads": 1024}]
    kernels = {
        dataclasses.replace(key, kernel=str(i), arch=arch): dataclasses.replace(FINE, **variant)
        for i, variant in enumerate(variants)
        for arch in (80, 86)
    }
    blocks = [kernel.blocks_per_sm for kernel in compiled.with_occupancy(kernels).values()]
    assert blocks == [8, 6, 4, 4, 3, 3, 4, 2, 2, 1]


def test_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiled, "find_tool", lambda name: None)
    monkeypatch.setattr(gate, "find_tool", lambda name: None)
    compiled.tool.cache_clear()
    assert gate.main(["--archs", "80"]) == 2
    assert capsys.readouterr().err.startswith("cuda gate: there is no nvcc; `make cuda` gets it from PyPI")
    assert gate.main(["--find", "nvcc"]) == 1


# ---- the lint --------------------------------------------------------------------------------------------------------

RAW = {
    "__shared__ float sums[32];": "__shared__: use DEEPOPS_SHARED",
    "extern __shared__ char all[];": "__shared__: use DEEPOPS_SHARED",
    "atomicAdd(sum, 1.0f);": "atomicAdd(: use gpu::atomic_add",
    'asm volatile("bar.sync 0;");': "asm: use a function",
    "v += __shfl_xor_sync(~0u, v, 1);": "__shfl_xor_sync: use gpu::shuffle",
    "__syncthreads();": "__syncthreads: use gpu::barrier",
    "__syncwarp();": "__syncwarp: use gpu::barrier",
    "__threadfence();": "__threadfence: use gpu::barrier",
    "v = __ldg(p);": "__ldg(: use gpu::load",
    "const int i = threadIdx.x;": "threadIdx: use gpu::thread",
    "kernel<<<1, 256>>>(p);": "<<<: use gpu::launch",
    "__global__ void k();": "__global__: use DEEPOPS_KERNEL",
    "__device__ int f();": "__device__: use DEEPOPS_KERNEL",
    "cudaMemsetAsync(p, 0, n, s);": "cudaMemsetAsync: use a function",
    "#include <cuda_runtime.h>": "use core/gpu.cuh",
}
FOLLOWED = ["v = p[i];", "v = *p;", "*(p + i) = v;", "*p = v;", "v = s.member[i];", "if (n) *p = v;", "p->x = v;"]
FOLLOWED += ["v = *reinterpret_cast<const float*>(q);"]
ALLOWED = ["v = a[i] * v;", "v = a[i] *\n      v;", "gpu::store(p + i, v);", "// p[i] and *p", "x.value[i] = v * i;"]
ALLOWED += ['f("threadIdx");', "const float* other = p + i;", "f(&p[i], &s.member[i]);"]


def planted(line: str, folder: Path, suffix: str = "cu") -> list[str]:
    """What the lint says about a kernel with this line, which is line 6."""
    path = folder / f"x_cuda.{suffix}"
    path.write_text(
        "struct S {\n  const float* member;\n};\nDEEPOPS_KERNEL(256) k(float* p, const void* q, S s, int n) {\n"
        f"  float a[4], v = 0;\n  {line}\n}}\nvoid host(int* p) {{ p[0] = 1; }}\n"
    )
    return lint.findings(path, folder)


@pytest.mark.parametrize("line", RAW)
@pytest.mark.parametrize("suffix", ["cu", "h"])
def test_raw_cuda_is_named_with_its_line(line: str, suffix: str, tmp_path: Path) -> None:
    found = planted(line, tmp_path, suffix)
    assert any(entry.startswith(f"{tmp_path.name}/x_cuda.{suffix}:6: ") and RAW[line] in entry for entry in found), (
        found
    )


@pytest.mark.parametrize("line", FOLLOWED)
def test_a_followed_pointer_is_named_with_its_line(line: str, tmp_path: Path) -> None:
    (found,) = planted(line, tmp_path)
    assert ":6: " in found
    assert "followed" in found


@pytest.mark.parametrize("line", ALLOWED)
def test_what_is_allowed_is_not_named(line: str, tmp_path: Path) -> None:
    assert planted(line, tmp_path) == []


def test_the_sources_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert lint.main([]) == 0, capsys.readouterr().out


def test_only_three_files_may_say_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    for name, count in (("gpu.cuh", 0), ("tensor_core.cuh", 0), ("host_device.h", 1), ("other.h", 2)):
        path = tmp_path / "core" / name
        path.write_text("__host__ __device__ int f();\n__syncthreads();\n")
        assert len({entry.split(":")[1] for entry in lint.findings(path, tmp_path)}) == count
