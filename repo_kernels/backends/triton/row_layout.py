"""How a program walks over one row: 16-byte pieces, and a few columns taken one by one.

A row may start at any address. Its columns are split into three sets, each read and written by one access only:
  pieces  the aligned middle, E columns = 16 bytes each, taken R at a time as an (R, E) block: E columns stay in one
          thread. Every access to them is 16 bytes wide, masked ones too, since a piece is masked as a whole.
  edges   what is left of the row before the first boundary and after the last one, and the other columns of the
          target's piece: at most 3 E columns, one per lane of an (EDGES,) vector that every warp holds.
  target  the column of the row's token. Left out of the sums of the other two, 1 - p_y is found without cancellation;
          written by nobody else, its gradient needs no barrier.
"""
# ruff: noqa: N803, N806 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

EDGES = tl.constexpr(32)


@triton.jit
def row_offset(row, length, stride_sequence, stride_token):
    """int64 elements from the base to flat row `row` of (T, V) or (B, L, V) logits."""
    sequence, token = row // length, row % length
    return sequence.to(tl.int64) * stride_sequence + token.to(tl.int64) * stride_token


@triton.jit
def aligned(row, head):
    """Pointer to the first 16-byte boundary of the row."""
    return tl.multiple_of(row + head, [16])


@triton.jit
def peel(row, columns):
    """(columns before the first 16-byte boundary, 16-byte pieces after it) of the row at pointer `row`."""
    SIZE: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    E: tl.constexpr = 16 // SIZE
    head = (-(row.to(tl.int64) // SIZE) & (E - 1)).to(tl.int32)
    head = tl.minimum(head, columns)
    return head, (columns - head) // E


@triton.jit
def target_piece(target, head, pieces, E: tl.constexpr):
    """Index of the piece that holds the target, -1 if none does."""
    return tl.where((target >= head) & (target < head + pieces * E), (target - head) // E, -1)


@triton.jit
def edge_columns(target, hole, head, pieces, columns, E: tl.constexpr):
    """(EDGES,) columns of the edges and whether the lane has one; `hole` is the target's piece."""
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
    """(R, E) pointers of the block at pointer `middle`, which is aligned to 16 bytes."""
    return middle + (tl.arange(0, R)[:, None] * E + tl.arange(0, E)[None, :])


@triton.jit
def whole_blocks(hole, pieces, R: tl.constexpr):
    """(blocks that need no mask, the first block that needs one, blocks in all, stride between those that need one).

    Masked are the block with the target's piece and the last one if it is short: at most two, visited by
    range(first, blocks, stride). Unmasked block i is i + (i >= first).
    """
    full = pieces // R
    first = tl.where(hole >= 0, hole // R, full)
    return tl.where(first < full, full - 1, full), first, tl.cdiv(pieces, R), tl.maximum(full - first, 1)


@triton.jit
def live_pieces(block, hole, pieces, R: tl.constexpr):
    """(R,) pieces of the block that are in the row and do not hold the target."""
    piece = block * R + tl.arange(0, R)
    return (piece < pieces) & (piece != hole)
