"""The variants of the kernels that the public functions can reach, and how they are compiled: at most 48 per target.

Launches and ahead-of-time inspection use the same list. To keep it short, softcap and full KL exist only together with
the entropy's gradient, which runs with slope 0 if it is not asked for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..interface import ENTROPY_GRADIENT, ENTROPY_NONE, ENTROPY_VALUE
from . import kernels

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
BLOCK_PIECES = 2048  # 16-byte pieces in a block held in registers: 32 KB
HELD_BLOCKS = (1, 3)  # the numbers of blocks that a variant can hold

_POINTERS = {"ids": "*i64"} | dict.fromkeys(
    ("values", "scalars", "losses", "tokens", "state", "slopes", "upstream"), "*fp32"
)
_INTEGERS = ("count", "length", "columns", "code", "entropy_mode", "want_grad")


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel.

    Args:
        name: unique.
        kind: fused-swept, fused-resident, statistics, apply or scale.
        dtype: of the logits: fp32, bf16 or fp16.
        entropy: ENTROPY_NONE, ENTROPY_VALUE or ENTROPY_GRADIENT.
        softcap, full_kl: whether the variant has them.
        kernel: the Triton function.
        signature: argument -> Triton type or "constexpr".
        constexprs: argument -> value.
        divisible: positions of arguments known to be multiples of 16. Empty: kernels handle the alignment of a row
            themselves.
        num_warps, num_stages: of a program.
        elements_per_thread: logits per thread in one trip of the swept loop, or held.
        max_registers: per thread, or None.
    """

    name: str
    kind: str
    dtype: str
    entropy: int
    softcap: bool
    full_kl: bool
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int
    elements_per_thread: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler. Contraction is off, since fma is written where it is meant."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": False}
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


def warps_and_pieces(
    kind: str, entropy: int, softcap: bool, full_kl: bool, held: int, warp_size: int
) -> tuple[int, int]:
    """Choose (warps of a program, 16-byte pieces of a block).

    Every warp computes what is needed once per row, so the plain loss takes few warps and many pieces, and takes more
    warps only where it would spill. Either way a swept loss takes more than half of the registers of a multiprocessor,
    so that one row is in flight on each and the second sweep finds it in L2. Two rows held in one block each share a
    multiprocessor. Kernels that sweep once need no row in L2: they take many programs of few warps, and blocks small
    enough for short rows.
    """
    half = softcap or full_kl or (kind == "statistics" and entropy != ENTROPY_NONE)
    if kind in ("statistics", "apply", "scale"):
        return 4, BLOCK_PIECES // (8 if half else 4)
    if held == 1:
        return 8, BLOCK_PIECES
    if kind == "fused-resident":
        return 16, BLOCK_PIECES
    if entropy == ENTROPY_NONE:
        return 16, 2 * BLOCK_PIECES
    return 32 if warp_size == 32 else 16, BLOCK_PIECES // 2 if half else BLOCK_PIECES


def make_variant(
    kind: str,
    dtype: str,
    warp_size: int,
    entropy: int = ENTROPY_NONE,
    softcap: bool = False,
    full_kl: bool = False,
    held: int = 0,
) -> Variant:
    """Describe the variant with these options. held: blocks of a row in registers, 0 for a swept row."""
    kernel = {"statistics": kernels.statistics, "apply": kernels.apply, "scale": kernels.scale}.get(kind, kernels.fused)
    warps, pieces = warps_and_pieces(kind, entropy, softcap, full_kl, held, warp_size)
    constexprs: dict[str, Any] = {"R": pieces}
    if kind != "scale":
        constexprs |= {"ENTROPY": entropy, "SOFTCAP": softcap, "FULL_KL": full_kl}
    if kernel is kernels.fused:
        constexprs |= {"HELD": held}
    signature = {}
    for name in kernel.arg_names:
        integer = "i32" if name in _INTEGERS else "i64"
        pointer = f"*{dtype}" if name in ("logits", "ref_logits", "grad") else _POINTERS.get(name, integer)
        signature[name] = "constexpr" if name in constexprs else "fp32" if name == "softcap" else pointer
    parts = [kind, dtype, ("", "entropy", "entropy-gradient")[entropy], "softcap" * softcap, "full-kl" * full_kl]
    return Variant(
        name="-".join(part for part in (*parts, f"{held}-blocks" * bool(held)) if part),
        kind=kind,
        dtype=dtype,
        entropy=entropy,
        softcap=softcap,
        full_kl=full_kl,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=(),
        num_warps=warps,
        num_stages=1,
        elements_per_thread=pieces * 16 // ELEMENT_BYTES[dtype] // (warps * warp_size) * max(held, 1),
        # two programs of 256 threads fit then; AMD's compiler takes no such limit
        max_registers=128 if held == 1 and warp_size == 32 else None,
    )


@functools.cache
def fused_variant(dtype: str, columns: int, entropy: int, softcap: bool, full_kl: bool, warp_size: int) -> Variant:
    """Return the variant that runs `fused` on rows of so many columns."""
    if softcap or full_kl:
        return make_variant("fused-swept", dtype, warp_size, ENTROPY_GRADIENT, softcap, full_kl)
    block = BLOCK_PIECES * 16 // ELEMENT_BYTES[dtype]
    held = next((blocks for blocks in HELD_BLOCKS if columns <= blocks * block), 0)
    if entropy == ENTROPY_GRADIENT or not held:
        return make_variant("fused-swept", dtype, warp_size, entropy)
    return make_variant("fused-resident", dtype, warp_size, entropy, held=held)


@functools.cache
def statistics_variant(dtype: str, entropy: int, softcap: bool, full_kl: bool, warp_size: int) -> Variant:
    """Return the variant that runs `statistics`. Full KL is not in `variants`, since the losses always fuse it."""
    entropy = ENTROPY_VALUE if softcap or full_kl or entropy else ENTROPY_NONE
    return make_variant("statistics", dtype, warp_size, entropy, softcap, full_kl)


@functools.cache
def apply_variant(dtype: str, softcap: bool, full_kl: bool, warp_size: int) -> Variant:
    """Return the variant that runs `apply`. Full KL is not in `variants`, since the losses always fuse it."""
    return make_variant("apply", dtype, warp_size, ENTROPY_GRADIENT, softcap, full_kl)


@functools.cache
def scale_variant(dtype: str, warp_size: int) -> Variant:
    """Return the variant that runs `scale_rows`."""
    return make_variant("scale", dtype, warp_size)


def variants(warp_size: int = 32) -> list[Variant]:
    """List all variants that public functions can reach on a target with warps of so many threads."""
    reachable: list[Variant] = []
    for dtype, size in ELEMENT_BYTES.items():
        block = BLOCK_PIECES * 16 // size
        for entropy in (ENTROPY_NONE, ENTROPY_VALUE, ENTROPY_GRADIENT):
            widths = (*(blocks * block for blocks in HELD_BLOCKS), HELD_BLOCKS[-1] * block + 1)
            reachable += [fused_variant(dtype, columns, entropy, False, False, warp_size) for columns in widths]
        for softcap, full_kl in ((True, False), (False, True), (True, True)):
            reachable.append(fused_variant(dtype, block, ENTROPY_GRADIENT, softcap, full_kl, warp_size))
        for entropy, softcap in ((ENTROPY_NONE, False), (ENTROPY_VALUE, False), (ENTROPY_VALUE, True)):
            reachable.append(statistics_variant(dtype, entropy, softcap, False, warp_size))
        reachable += [apply_variant(dtype, softcap, False, warp_size) for softcap in (False, True)]
        reachable.append(scale_variant(dtype, warp_size))
    return list({variant.name: variant for variant in reachable}.values())
