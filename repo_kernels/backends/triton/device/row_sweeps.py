"""Sweeps over a row in global memory, which gather its statistics, write its gradient, zero it or scale it.

`row` is (pointer, head, pieces, hole, target's column), see row_layout.py. One loop takes the unmasked blocks, another
the masked ones, at most two. The second sweep goes backwards, so that it starts with what the cache saw last.
"""
# ruff: noqa: N803, N806 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .row_gradient import column_gradient
from .row_layout import EDGES, aligned, block_pointers, edge_columns, live_pieces, whole_blocks
from .row_statistics import accumulate, prepare


@triton.jit
def load_block(pointers, block, live, POLICY: tl.constexpr):
    """Load the logits (R, E) of a block; -inf where not live. live: (R,), or None for all."""
    pointers += block * (pointers.shape[0] * pointers.shape[1])
    if live is None:
        x = tl.load(pointers, eviction_policy=POLICY)
    else:
        x = tl.load(pointers, mask=live[:, None], other=float("-inf"), eviction_policy=POLICY)
    return x


@triton.jit
def store_block(pointers, block, live, values):
    """Round values (R, E) once and store them where live."""
    pointers += block * (pointers.shape[0] * pointers.shape[1])
    values = values.to(pointers.dtype.element_ty)
    if live is None:
        tl.store(pointers, values, eviction_policy="evict_first")
    else:
        tl.store(pointers, values, mask=live[:, None], eviction_policy="evict_first")


@triton.jit
def load_edges(pointer, column, live):
    """Load the logits (EDGES,) of the edges; -inf where a lane has none."""
    return tl.load(pointer + column, mask=live, other=float("-inf"))


@triton.jit
def block_statistics(lanes, pointers, ref_pointers, block, live, scale, softcap, inverse_softcap,
                     POLICY: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
                     FULL_KL: tl.constexpr):  # fmt: skip
    """Load a block and accumulate it into the lanes."""
    FINITE: tl.constexpr = ENTROPY or FULL_KL
    x = load_block(pointers, block, live, POLICY)
    ref_x = load_block(ref_pointers, block, live, POLICY) if FULL_KL else x
    mask = None if live is None else live[:, None]
    z, _ = prepare(x, mask, softcap, inverse_softcap, SOFTCAP, FINITE)
    ref_z = z
    if FULL_KL:
        ref_z, _ = prepare(ref_x, mask, softcap, inverse_softcap, SOFTCAP, FINITE)
    return accumulate(lanes, z, ref_z, scale, ENTROPY, FULL_KL)


@triton.jit
def sweep_statistics(lanes, row, ref_pointer, scale, softcap, inverse_softcap, R: tl.constexpr, E: tl.constexpr,
                     POLICY: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
                     FULL_KL: tl.constexpr):  # fmt: skip
    """Accumulate all pieces of the row into the lanes, reading each once."""
    pointer, head, pieces, hole, _ = row
    pointers = block_pointers(aligned(pointer, head), R, E)
    ref_pointers = block_pointers(aligned(ref_pointer, head), R, E)
    plain, first, blocks, stride = whole_blocks(hole, pieces, R)
    for i in range(plain):
        block = i + (i >= first).to(tl.int32)
        lanes = block_statistics(lanes, pointers, ref_pointers, block, None, scale, softcap, inverse_softcap,
                                 POLICY, ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip
    for block in range(first, blocks, stride):
        live = live_pieces(block, hole, pieces, R)
        lanes = block_statistics(lanes, pointers, ref_pointers, block, live, scale, softcap, inverse_softcap,
                                 POLICY, ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip
    return lanes


@triton.jit
def gradient_of(x, ref_x, factor, max2, ref_max2, scale, softcap, inverse_softcap, ENTROPY: tl.constexpr,
                SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr):  # fmt: skip
    """Compute dL/dz in fp32 from logits as they were loaded."""
    FINITE: tl.constexpr = ENTROPY or FULL_KL
    z, slope = prepare(x, None, softcap, inverse_softcap, SOFTCAP, FINITE)
    ref_z = z
    if FULL_KL:
        ref_z, _ = prepare(ref_x, None, softcap, inverse_softcap, SOFTCAP, FINITE)
    return column_gradient(z, slope, ref_z, factor, max2, ref_max2, scale, SOFTCAP, ENTROPY, FULL_KL)


@triton.jit
def block_gradient(pointers, ref_pointers, grad_pointers, block, live, factor, max2, ref_max2, scale, softcap,
                   inverse_softcap, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr):  # fmt: skip
    """Read a block and write its gradient."""
    x = load_block(pointers, block, live, "evict_first")
    ref_x = load_block(ref_pointers, block, live, "evict_first") if FULL_KL else x
    values = gradient_of(x, ref_x, factor, max2, ref_max2, scale, softcap, inverse_softcap, ENTROPY, SOFTCAP, FULL_KL)
    store_block(grad_pointers, block, live, values)


@triton.jit
def sweep_gradient(row, ref_pointer, grad_pointer, factor, max2, ref_max2, scale, softcap, inverse_softcap,
                   R: tl.constexpr, E: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
                   FULL_KL: tl.constexpr):  # fmt: skip
    """Write the gradient of all pieces of the row, last block first; in place is allowed."""
    pointer, head, pieces, hole, _ = row
    pointers = block_pointers(aligned(pointer, head), R, E)
    ref_pointers = block_pointers(aligned(ref_pointer, head), R, E)
    grad_pointers = block_pointers(aligned(grad_pointer, head), R, E)
    plain, first, blocks, stride = whole_blocks(hole, pieces, R)
    for block in range(first, blocks, stride):
        live = live_pieces(block, hole, pieces, R)
        block_gradient(pointers, ref_pointers, grad_pointers, block, live, factor, max2, ref_max2, scale, softcap,
                       inverse_softcap, ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip
    for i in range(plain):
        block = plain - 1 - i
        block += (block >= first).to(tl.int32)
        block_gradient(pointers, ref_pointers, grad_pointers, block, None, factor, max2, ref_max2, scale, softcap,
                       inverse_softcap, ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip


@triton.jit
def zero_row(pointer, head, pieces, columns, R: tl.constexpr, E: tl.constexpr):
    """Fill a row with zeros."""
    pointers = block_pointers(aligned(pointer, head), R, E)
    zeros = tl.zeros([R, E], tl.float32)
    for block in range(tl.cdiv(pieces, R)):
        store_block(pointers, block, live_pieces(block, -1, pieces, R), zeros)
    column, live = edge_columns(-1, -1, head, pieces, columns, E)
    tl.store(pointer + column, tl.zeros([EDGES], tl.float32).to(pointer.dtype.element_ty), mask=live)


@triton.jit
def scale_row(pointer, head, pieces, columns, factor, R: tl.constexpr, E: tl.constexpr):
    """Multiply a row by a scalar in place, with one rounding."""
    pointers = block_pointers(aligned(pointer, head), R, E)
    for block in range(tl.cdiv(pieces, R)):
        live = live_pieces(block, -1, pieces, R)
        store_block(pointers, block, live, load_block(pointers, block, live, "evict_first").to(tl.float32) * factor)
    column, live = edge_columns(-1, -1, head, pieces, columns, E)
    values = load_edges(pointer, column, live).to(tl.float32) * factor
    tl.store(pointer + column, values.to(pointer.dtype.element_ty), mask=live)
