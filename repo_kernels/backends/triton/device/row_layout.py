"""The parts of a row: 16-byte pieces, and a few columns that are taken one by one.

A row may start at any address. Its columns are split into three sets, each of which is accessed separately:
  pieces  the aligned middle, E columns each, taken R at a time as an (R, E) block, with the E columns of a piece in one
          thread. E columns are 16 bytes of the logits or, if the gradient has a narrower type, of the gradient. Every
          access is 16 bytes wide, also a masked one, since a piece is masked as a whole.
  edges   the columns before the first boundary and after the last one, and the other columns of the target's piece: at
          most 3 E columns, one per lane of an (EDGES,) vector that every warp holds.
  target  the column of the row's token. The sums of the others leave it out, so that 1 - p_y does not cancel. Its
          gradient needs no barrier, because nothing else writes it.
"""
# ruff: noqa: N803, N806 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

EDGES = tl.constexpr(32)


@triton.jit
def row_offset(row, length, stride_sequence, stride_token):
    """Return the offset of flat row `row` of (T, V) or (B, L, V) logits, int64 elements."""
    sequence, token = row // length, row % length
    return sequence.to(tl.int64) * stride_sequence + token.to(tl.int64) * stride_token


@triton.jit
def aligned(row, head):
    """Return the pointer to the first 16-byte boundary of the row."""
    return tl.multiple_of(row + head, [16])


@triton.jit
def peel(row, columns, E: tl.constexpr):
    """Return (columns before the first boundary of a piece, pieces after it) of the row at pointer `row`."""
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    head = (-(row.to(tl.int64) // SIZE) & (E - 1)).to(tl.int32)
    head = tl.minimum(head, columns)
    return head, (columns - head) // E


@triton.jit
def target_piece(target, head, pieces, E: tl.constexpr):
    """Return the index of the piece that holds the target, -1 if none does."""
    return tl.where((target >= head) & (target < head + pieces * E), (target - head) // E, -1)


@triton.jit
def edge_columns(target, hole, head, pieces, columns, E: tl.constexpr):
    """Return the columns of the edges, (EDGES,), and whether a lane has one; `hole` is the target's piece."""
    lane = tl.arange(0, EDGES)
    part = lane // E
    after = head + pieces * E
    start = tl.where(part == 0, 0, tl.where(part == 1, after, head + hole * E))
    beside = tl.where((part == 2) & (hole >= 0), start + E, start)
    stop = tl.where(part == 0, head, tl.where(part == 1, columns, beside))
    column = start + lane % E
    return column, (column < stop) & (column != target)


@triton.jit
def block_pointers(middle, R: tl.constexpr, E: tl.constexpr):
    """Return the pointers (R, E) of the block at pointer `middle`, which is aligned to 16 bytes."""
    return middle + (tl.arange(0, R)[:, None] * E + tl.arange(0, E)[None, :])


@triton.jit
def whole_blocks(hole, pieces, R: tl.constexpr):
    """Return (number of unmasked blocks, first masked block, number of blocks, stride between masked blocks).

    Masked are the block with the target's piece, and the last one if it is short: at most two, which
    range(first, blocks, stride) visits. The unmasked block number i is block i + (i >= first).
    """
    full = pieces // R
    first = tl.where(hole >= 0, hole // R, full)
    return tl.where(first < full, full - 1, full), first, tl.cdiv(pieces, R), tl.maximum(full - first, 1)


@triton.jit
def live_pieces(block, hole, pieces, R: tl.constexpr):
    """Return which pieces (R,) of the block are in the row and do not hold the target."""
    piece = block * R + tl.arange(0, R)
    return (piece < pieces) & (piece != hole)
