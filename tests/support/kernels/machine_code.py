"""What every compiled kernel must be: without spills, 16 bytes an access, small enough for several programs."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.compiled.kernels import CompiledKernel

QUICK_TARGETS = ("sm_90", "gfx942")
SWEEPING = {"fused", "statistics", "apply", "scale"}  # a program a row; the others run as one program
KINDS = SWEEPING | {"prepare", "reduce"}
FEWEST_PROGRAMS = 2  # that a multiprocessor must hold of a kernel that sweeps rows


def check(kernels: Sequence[CompiledKernel]) -> None:
    """Assert no spills, no local memory, accesses of the logits 16 bytes wide, and FEWEST_PROGRAMS."""
    assert kernels

    def having(what: str) -> list[tuple]:
        return [(k.target, k.name, getattr(k, what)) for k in kernels if getattr(k, what)]

    sweeping = [k for k in kernels if k.kind in SWEEPING]
    assert not having("spills")
    assert not having("local_bytes")
    assert not [(k.target, k.name, k.narrow) for k in sweeping if k.narrow]
    # gfx942 has fewer scalar registers than `fused` has arguments. What does not fit is kept in lanes of a vector
    # register, not in memory, and moved once a row, not in loops.
    assert not [(k.target, k.name) for k in kernels if k.in_loops.lane_moves]
    # What a thread takes of a row, in a trip of its loop or in all, comes in full-width loads.
    assert not [(k.target, k.name, k.wide_elements) for k in kernels if k.wide_elements < k.elements_per_thread]
    # Every target has that much shared memory for a program without asking for more.
    assert not [k for k in kernels if k.shared_bytes > 48 * 1024]
    assert not [(k.target, k.name, k.registers) for k in sweeping if k.programs < FEWEST_PROGRAMS]


def check_decode(kernels: Sequence[CompiledKernel]) -> None:
    """Assert of kernels of a decode step: no spills, no local memory, and keys and values loaded 16 bytes at a time."""
    assert kernels
    assert not [(k.target, k.name, k.spills, k.local_bytes) for k in kernels if k.spills or k.local_bytes]
    assert not [(k.target, k.name, k.in_loops.loads) for k in kernels if k.kind == "attend" and k.narrow]
    assert not [k for k in kernels if k.shared_bytes > 48 * 1024]
