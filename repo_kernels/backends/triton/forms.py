"""Launch forms: how many warps and registers a program of a kernel gets, and how much of a row it takes at a time.

Measured on an H200 (docs/benchmarks.md): two to four programs on a multiprocessor beat one whose row stays in registers
or alone in the L2 cache, at every width. While one waits at a barrier another computes, and the second sweep over a row
is read from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..codes import ENTROPY_NONE

NARROW, WIDE = 24_000, 120_000  # bytes of a row: V = 12 000 and 60 000 in bf16


@dataclass(frozen=True)
class LaunchForm:
    """One form.

    Args:
        warps: of a program.
        pieces: pieces of 16 bytes in a block.
        max_registers: of a thread, or None for what the compiler takes.
    """

    warps: int
    pieces: int
    max_registers: int | None = None


def fused_form(
    row_bytes: int, narrowed: bool, entropy: int, softcap: bool, full_kl: bool, warp_size: int
) -> LaunchForm:
    """Choose the form of `fused`.

    More per logit than the plain loss computes takes more registers: blocks are half as large then, or a quarter.

    Args:
        row_bytes: V times the size of a logit.
        narrowed: the gradient has a narrower type than the logits, so that a piece is twice as large.
        entropy, softcap, full_kl: what the variant computes.
        warp_size: 32, or 64, where a limit of registers is not known to the compiler.
    """
    small = 1 if entropy == ENTROPY_NONE else 2
    small *= 2 if softcap or full_kl or narrowed else 1
    limit = 64 if warp_size == 32 else None
    if row_bytes <= NARROW and not narrowed:
        return LaunchForm(_warps(128, warp_size), 512 // small)
    if row_bytes <= WIDE:
        return LaunchForm(_warps(256, warp_size), 1024 // small, limit)
    return LaunchForm(_warps(512, warp_size), 2048 // small, limit)


def single_sweep_form(more: bool, warp_size: int) -> LaunchForm:
    """Choose the form of a kernel that sweeps once: many programs of few warps. more: it has a softcap or entropy."""
    return LaunchForm(_warps(128, warp_size), 256 if more else 512)


def _warps(threads: int, warp_size: int) -> int:
    return threads // warp_size
