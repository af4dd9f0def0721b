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
class Target:
    """What the forms depend on of a GPU.

    Args:
        warp_size: threads of a warp, 32 or 64.
        blackwell: compute capability 10 or later. Its compiler needs more registers for the same block.
    """

    warp_size: int
    blackwell: bool = False


# How `fused` takes its rows. SWEPT: each is read twice. KEPT: the block that the first sweep reads last stays in
# registers for the second. PERSISTENT: a program takes several rows, and loads the first block of the next one before
# it writes the last of this one. The public functions use SWEPT; the others are there to be measured.
SWEPT, KEPT, PERSISTENT = range(3)


@dataclass(frozen=True)
class LaunchForm:
    """One form.

    Args:
        warps: of a program.
        pieces: pieces of 16 bytes in a block.
        max_registers: of a thread, or None for what the compiler takes.
        rows: SWEPT, KEPT or PERSISTENT, for `fused`.
    """

    warps: int
    pieces: int
    max_registers: int | None = None
    rows: int = SWEPT


def fused_form(
    row_bytes: int, item_bytes: int, narrowed: bool, entropy: int, softcap: bool, full_kl: bool, target: Target
) -> LaunchForm:
    """Choose the form of `fused`.

    What the entropy, a softcap and the full KL compute for each logit takes registers, which smaller blocks give back.

    Args:
        row_bytes: V times the size of a logit.
        item_bytes: the size of a logit.
        narrowed: the gradient has a narrower type than the logits, so that a piece is twice as large.
        entropy, softcap, full_kl: what the variant computes.
        target: the GPU. The compiler takes no limit of registers for warps of 64 threads.
    """
    warp_size, limited = target.warp_size, target.warp_size == 32
    if full_kl and (softcap or narrowed):  # no form of 64 registers holds it
        threads, pieces = (128, 128) if row_bytes <= NARROW and not narrowed else (256, 256)
        return LaunchForm(threads // warp_size, pieces, 128 if limited else None)
    if narrowed and target.blackwell:  # its compiler needs more than 64, of which wider programs would fit once
        return LaunchForm(256 // warp_size, 256, 80)
    share = 1 if entropy == ENTROPY_NONE and not target.blackwell else 2
    share *= 2 if softcap or full_kl or narrowed else 1
    if row_bytes <= NARROW and not narrowed:
        return LaunchForm(128 // warp_size, 512 // share, None if softcap or full_kl or not limited else 64)
    if row_bytes <= WIDE or (target.blackwell and item_bytes == 4):  # 16 warps of fp32 would spill there
        return LaunchForm(256 // warp_size, max(1024 // share, 256), 64 if limited else None)
    pieces = 2048 if item_bytes == 2 else 1024
    return LaunchForm(512 // warp_size, max(pieces // share, 512), 64 if limited else None)


def single_sweep_form(more: bool, target: Target) -> LaunchForm:
    """Choose the form of a kernel that sweeps once: many programs of few warps. more: it has a softcap or entropy."""
    return LaunchForm(128 // target.warp_size, 256 if more else 512)
