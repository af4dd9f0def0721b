"""The Triton kernels as machine code, without a GPU: no spills, full-width accesses.

A normal run compiles the bf16 variants for one target of each maker; the rest is `make test-aot`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter

import pytest

import benchmarks.compiled.__main__ as command
from benchmarks.compiled.kernels import TARGETS, CompiledKernel, compile_all, names

QUICK_TARGETS = ("sm_90", "gfx942")
KINDS = {"fused", "statistics", "apply", "scale"}  # whose logits are bf16; "prepare" and "reduce" read none

needs_kernels = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def quick() -> list[CompiledKernel]:
    """The bf16 variants for QUICK_TARGETS."""
    return compile_all(QUICK_TARGETS, ["bf16"])


def check(kernels: list[CompiledKernel]) -> None:
    """No spills, no local memory, accesses of the logits 16 bytes wide."""
    assert kernels

    def having(what: str) -> list[tuple]:
        return [(k.target, k.name, getattr(k, what)) for k in kernels if getattr(k, what)]

    assert not having("spills")
    assert not having("local_bytes")
    assert not having("narrow")
    # Softcap with full KL, the largest kernel, keeps ten of gfx942's scalar registers in lanes of a vector register.
    assert not [k for k in kernels if k.lane_copies > 10 * ("softcap-full-kl" in k.name)]
    # What a thread takes of a row, in a trip of its loop or in all, comes in full-width loads.
    assert not [(k.target, k.name, k.wide_elements) for k in kernels if k.wide_elements < k.elements_per_thread]
    # Every target has that much shared memory for a program without asking for more.
    assert not [k for k in kernels if k.shared_bytes > 48 * 1024]


@needs_kernels
@pytest.mark.slow
def test_no_spills_and_full_width_accesses(quick: list[CompiledKernel]) -> None:
    check(quick)
    assert {kernel.kind for kernel in quick} == KINDS


@needs_kernels
@pytest.mark.aot
@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_full_width_accesses_in_every_type(target: str) -> None:
    kernels = compile_all([target])
    check(kernels)
    assert {kernel.dtype for kernel in kernels} == {"fp32", "bf16", "fp16"}


@needs_kernels
@pytest.mark.slow
def test_rows_are_loaded_in_loops(quick: list[CompiledKernel]) -> None:
    for kernel in quick:
        assert kernel.in_loops.loads.get(16), kernel.name


@needs_kernels
def test_at_most_104_different_variants_for_each_target() -> None:
    for target, listed in names(TARGETS).items():
        assert 0 < len(listed) <= 104, target
        assert not [name for name, times in Counter(name for name, _, _ in listed).items() if times > 1]


@needs_kernels
@pytest.mark.slow
def test_wave64_variants_never_have_32_warps(quick: list[CompiledKernel]) -> None:
    assert not [kernel.name for kernel in quick if kernel.target == "gfx942" and kernel.num_warps >= 32]


@needs_kernels
@pytest.mark.slow
def test_command_prints_a_row_for_every_kernel(quick: list[CompiledKernel], monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        command, "compile_all", lambda targets, dtypes: [k for k in quick if k.target in targets and k.dtype in dtypes]
    )
    command.main(["--targets", "sm_90", "--dtypes", "bf16", "--no-passes"])
    printed = capsys.readouterr().out
    assert "## sm_90" in printed
    for kernel in quick:
        line = f"| {kernel.name} | {kernel.num_warps} | {kernel.registers} | 0 / 0 | {kernel.shared_bytes} |"
        assert (line in printed) == (kernel.target == "sm_90")


@pytest.mark.parametrize("option", ["--targets", "--dtypes"])
def test_an_unknown_target_or_type_is_refused_by_name(option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main([option, "sm_90,fp8"])
    assert "fp8" in capsys.readouterr().err
