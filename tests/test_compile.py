"""scripts/compile_kernels.py: nothing goes unchecked, the figures are read rightly, and a spill does not pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.kernels.backend import TILES
from posttrain.scripts import compile_kernels
from posttrain.scripts.compile_kernels import Case, amd_usage, dtypes_of, nvidia_usage

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "compile_kernels.py"
# The checker on another package than kernels/.
ELSEWHERE = f"""
import sys
sys.path[:0] = [{str(SCRIPT.parent)!r}, "."]
import posttrain.kernels, elsewhere
sys.path.pop(0)
from posttrain.scripts import compile_kernels
posttrain.kernels = elsewhere
compile_kernels.cli(compile_kernels.main, compile_kernels.Config)
"""
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def hoarding_kernel(logits, stats, V, TILE: tl.constexpr):  # at least 256 numbers a thread across a reduction
    cols = tl.arange(0, 16 * TILE)
    a, b = tl.load(logits + cols), tl.load(logits + V + cols)
    tl.store(stats + cols, a * tl.sum(b, 0) + b * tl.sum(a, 0))

@triton.jit
def misspelt_kernel(logits, stats, V, TILE: tl.constexpr):
    cols = tl.arange(0, TILE)
    tl.store(stats + cols, tl.load(logits + cols), cols < W)

@triton.jit
def twice(x):
    return 2 * x

@triton.jit
def modest_kernel(logits, stats, V, TILE: tl.constexpr):
    cols = tl.arange(0, TILE)
    tl.store(stats + cols, twice(tl.load(logits + cols, cols < V, 0.0)), cols < V)
"""


def run(*command, cwd=ROOT) -> subprocess.CompletedProcess:
    """In a process where @triton.jit makes kernels for compilers, which conftest.py prevents in this one."""
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def elsewhere(tmp_path):
    def check(kernels: str) -> subprocess.CompletedProcess:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "a.py").write_text(kernels)
        return run("-c", ELSEWHERE, "--targets=sm_90", cwd=tmp_path)

    return check


def one_line(done: subprocess.CompletedProcess, code: int) -> str:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


# --- nothing goes unchecked


def test_the_kernels_are_found():
    """In one list, so that a kernel that is lost by accident is noticed."""
    names = one_line(run(SCRIPT, "--only=none such"), 2).strip().partition("kernels are ")[2].split(", ")
    assert sorted(names) == [
        "cost_grad_kernel", "cost_kernel", "divergence_kernel", "row_grad_kernel", "row_stats_kernel",
        "sinkhorn_grad_kernel", "sinkhorn_kernel",
    ]  # fmt: skip


def test_every_tile_flag_dtype_and_alignment_of_a_kernel_is_compiled(tmp_path):
    done = run(SCRIPT, "--only=row_stats", "--targets=sm_90", "--every", f"--out={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "out.json").read_text())
    got = {(c["types"]["logits"], c["aligned"], c["constants"]["HAS_CAP"], c["constants"]["TILE"], c["warps"])
           for c in cases}  # fmt: skip
    assert got == {(kind, aligned, cap, *tile) for kind in ("*fp32", "*bf16", "*fp16") for aligned in (True, False)
                   for cap in (True, False) for tile in TILES}  # fmt: skip
    assert len(cases) == len(got) and {c["target"] for c in cases} == {"sm_90"}
    assert all(16 <= c["registers"] <= 255 and c["shared"] > 0 and c["spills"] == 0 for c in cases)
    assert all(f"TILE={tile} warps={warps}" in done.stdout for tile, warps in TILES)


def test_dtypes_are_those_that_occur():
    triples = [tuple(d.values()) for d in dtypes_of(["da", "student", "teacher"])]
    assert triples[0] == ("*fp32",) * 3 and len(set(triples)) == len(triples) == 11
    assert ("*bf16", "*fp32", "*fp32") in triples  # a bf16 head: fp32 logits, and da as bf16 operand of the next GEMM
    assert ("*bf16", "*bf16", "*fp32") in triples and ("*fp32", "*bf16", "*bf16") not in triples
    assert [d["logits"] for d in dtypes_of(["logits"])] == ["*fp32", "*bf16", "*fp16"]
    assert list(dtypes_of([])) == [{}]


def test_a_parameter_of_unknown_type_is_an_error(elsewhere):
    assert "novelty" in one_line(elsewhere(KERNELS.replace("stats", "novelty")), 2)


@pytest.mark.parametrize(("flags", "words"), [([], "TRITON_INTERPRET"), (["--targets=sm_7"], "known are sm_80")])
def test_the_interpreter_and_unknown_targets_are_refused(flags, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compile_kernels.py", *flags])
    with pytest.raises(SystemExit) as stop:
        compile_kernels.cli(compile_kernels.main, compile_kernels.Config)
    assert stop.value.code == 2 and words in capsys.readouterr().err


# --- what fails


def test_kernels_that_spill_or_do_not_compile_fail_and_are_named(elsewhere):
    """Others pass, and a function that kernels call is no kernel."""
    done = elsewhere(KERNELS)
    line = one_line(done, 1)
    assert "8 of 12" in line and "modest" not in line
    assert "hoarding_kernel TILE=1024 warps=4 fp32 aligned sm_90 spills" in line
    assert "misspelt_kernel TILE=1024 warps=4 fp32 aligned sm_90" in line
    assert "modest_kernel" in done.stdout and "twice" not in done.stdout


@pytest.mark.parametrize(
    ("target", "figures", "complaint"),
    [
        ("sm_80", {"spills": 8}, "spills 8 bytes"),
        ("gfx942", {"spills": 8, "scalars": 2}, ""),
        ("sm_80", {"shared": 160 * 1024}, ""),
        ("gfx942", {"shared": 160 * 1024}, "needs 163840 bytes of shared memory"),
        ("gfx942", {"error": "no such instruction"}, "no such instruction"),
    ],
)
def test_complaints(target, figures, complaint):
    assert Case("module", "kernel", target, {}, {}, warps=4, aligned=True, **figures).complaint() == complaint


# --- figures, from recorded outputs


def test_nvidia_usage_counts_stack_and_local_memory():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function divergence_kernel:
  REG:{} STACK:{} SHARED:0 LOCAL:{} CONSTANT[0]:472 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert nvidia_usage(text.format(48, 0, 0)) == (48, 0)
    assert nvidia_usage(text.format(40, 8, 0)) == (40, 8)
    assert nvidia_usage(text.format(255, 0, 1904)) == (255, 1904)


def test_amd_usage_counts_scratch_and_spilled_scalars():
    text = """
    .group_segment_fixed_size: 2048
    .private_segment_fixed_size: 24
    .sgpr_count:     104
    .sgpr_spill_count: 14
    .vgpr_count:     70
    .vgpr_spill_count: 6
"""
    assert amd_usage(text) == (70, 24, 14)
