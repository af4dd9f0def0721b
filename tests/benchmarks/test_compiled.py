"""The Triton kernels as machine code, without a GPU: no spills, full-width accesses.

A normal run compiles the bf16 variants for one target of each maker; the rest is `make test-aot`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter

import pytest

import benchmarks.compiled.__main__ as command
from benchmarks.compiled.kernels import TARGETS, CompiledKernel, compile_all, forms
from tests.support.kernels.machine_code import KINDS, QUICK_TARGETS, SWEEPING, check, check_decode

needs_kernels = pytest.mark.skipif(
    sys.platform != "linux" or importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def quick() -> list[CompiledKernel]:
    """The bf16 variants for QUICK_TARGETS."""
    return compile_all(QUICK_TARGETS, ["bf16"])


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
    assert not [k.name for k in quick if k.kind in SWEEPING and not k.in_loops.loads.get(16)]


@needs_kernels
def test_at_most_104_different_variants_for_each_target() -> None:
    for target, listed in forms(TARGETS).items():
        assert 0 < len(listed) <= 104, target
        assert not [name for name, times in Counter(form.name for form in listed).items() if times > 1]


@needs_kernels
def test_case_11_no_value_and_no_alignment_of_an_argument_is_compiled_in() -> None:
    """Lengths, strides and scalars would compile a kernel anew otherwise."""
    assert not [(form.name, form.specialised) for form in forms(TARGETS)["sm_90"] if form.specialised]


@needs_kernels
@pytest.mark.slow
def test_kernels_of_a_decode_step_do_not_spill() -> None:
    """One of each sort; the rest is `make test-aot`."""
    only = "attend-bf16-7x64-split", "choose-bf16-128"
    kernels = compile_all(["sm_90"], part="decode", only=only)
    assert {kernel.name for kernel in kernels} == {*only}
    check_decode(kernels)


@needs_kernels
@pytest.mark.aot
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_a_decode_step_do_not_spill_in_any_type(target: str) -> None:
    kernels = compile_all([target], part="decode")
    assert {kernel.dtype for kernel in kernels} == {"fp32", "bf16", "fp16"}
    check_decode(kernels)


@needs_kernels
def test_decode_kernels_are_compiled_once_for_all_rows_and_lengths() -> None:
    listed = forms(["sm_90"], part="decode")["sm_90"]
    assert not [(form.name, form.specialised) for form in listed if form.specialised]
    assert len({form.name for form in listed}) == len(listed) > 50


@needs_kernels
@pytest.mark.slow
def test_wave64_variants_never_have_32_warps(quick: list[CompiledKernel]) -> None:
    assert not [kernel.name for kernel in quick if kernel.target == "gfx942" and kernel.num_warps >= 32]


@needs_kernels
@pytest.mark.slow
def test_command_prints_a_row_for_every_kernel(quick: list[CompiledKernel], monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        command,
        "compile_all",
        lambda targets, dtypes, triton, part: [k for k in quick if k.target in targets],
    )
    command.main(["--targets", "sm_90", "--dtypes", "bf16", "--no-passes"])
    printed = capsys.readouterr().out
    assert "## sm_90" in printed
    for kernel in quick:
        cells = (kernel.name, kernel.num_warps, kernel.registers, kernel.programs, "0 / 0", kernel.shared_bytes)
        line = f"| {' | '.join(map(str, cells))} |"
        assert (line in printed) == (kernel.target == "sm_90")


@pytest.mark.parametrize("option", ["--targets", "--dtypes"])
def test_an_unknown_target_or_type_is_refused_by_name(option: str, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main([option, "sm_90,fp8"])
    assert "fp8" in capsys.readouterr().err
