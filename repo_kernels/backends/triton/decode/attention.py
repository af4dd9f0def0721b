"""Attention of one new token per row over a static cache (flash decoding), with grouped heads and without a mask.

A program takes one key head of one row, with all query heads of its group, so that keys and values are read once. The
columns that the row sees, from its own start to the current column, are divided evenly among `splits` programs: one
launch serves every length. A second kernel joins the parts.
"""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..device.scalar_math import LOG2E, softcap_logits
from ..runtime_jit import runtime_jit


@triton.jit
def store_result(out, total, weighted, group, columns, D: tl.constexpr, G: tl.constexpr):
    """Write the heads (P, B) of a group divided by their totals (P,); zeros where a row sees no column."""
    divisor = tl.where(total == 0.0, 1.0, total)
    live = (group < G)[:, None] & (columns < D)[None, :]
    result = (weighted / divisor[:, None]).to(out.dtype.element_ty)
    tl.store(out + group[:, None] * D + columns[None, :], result, mask=live)


@runtime_jit
def attend(
    query, keys, values, starts, column, out, parts, maxima, totals, length: tl.int32, key_heads: tl.int32,
    splits: tl.int32, window: tl.int32, scale: tl.float32, softcap: tl.float32, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, B: tl.constexpr, N: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Attend from a group of heads to one part of its columns.

    query, out: (rows, key heads, G, D). keys, values: (rows, key heads, length, D). starts: (rows,) int64. column: (1,)
    int64, the last column that is seen. parts: (rows, key heads, splits, G, D); maxima, totals: without D; fp32,
    written if SPLIT, else `out` is. D, G padded to powers of two: B, P. N: columns at a time.
    """
    program = tl.program_id(0)
    split, head = program % splits, program // splits
    stop = tl.load(column).to(tl.int32) + 1
    start = tl.maximum(tl.load(starts + head // key_heads).to(tl.int32), stop - window)
    width = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), splits), N) * N
    first = start + split * width
    last = tl.minimum(first + width, stop)
    group, d, n = tl.arange(0, P), tl.arange(0, B), tl.arange(0, N)
    inside = (d < D)[None, :]
    heads = query + head.to(tl.int64) * (G * D)
    q = tl.load(heads + group[:, None] * D + d[None, :], mask=(group < G)[:, None] & inside, other=0.0)
    offset = (head.to(tl.int64) * length + first) * D
    # rows of both begin at boundaries of 16 bytes, which the launch looks at
    key_block = tl.multiple_of(keys + offset, [16]) + (n[:, None] * D + d[None, :])
    value_block = tl.multiple_of(values + offset, [16]) + (n[:, None] * D + d[None, :])
    most = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    weighted = tl.zeros([P, B], tl.float32)
    for at in range(first, last, N):
        seen = n < last - at
        k = tl.load(key_block, mask=seen[:, None] & inside, other=0.0)
        v = tl.load(value_block, mask=seen[:, None] & inside, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores, _ = softcap_logits(scores, softcap, 1 / softcap)
        scores = tl.where(seen[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        decay = tl.exp2(most - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * decay + tl.sum(weights, 1)
        product = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        weighted = weighted * decay[:, None] + product
        most = higher
        key_block += N * D
        value_block += N * D
    if SPLIT:
        place = program.to(tl.int64) * G
        live = (group < G)[:, None] & inside
        tl.store(parts + place * D + group[:, None] * D + d[None, :], weighted, mask=live)
        tl.store(maxima + place + group, most, mask=group < G)
        tl.store(totals + place + group, total, mask=group < G)
    else:
        store_result(out + head.to(tl.int64) * (G * D), total, weighted, group, d, D, G)


@runtime_jit
def join(
    parts, maxima, totals, out, splits: tl.int32, D: tl.constexpr, G: tl.constexpr, P: tl.constexpr, B: tl.constexpr
):
    """Join the parts of one group of heads: arguments of `attend`."""
    head = tl.program_id(0).to(tl.int64)
    group, d = tl.arange(0, P), tl.arange(0, B)
    live = (group < G)[:, None] & (d < D)[None, :]
    most = tl.full([P], float("-inf"), tl.float32)
    total = tl.zeros([P], tl.float32)
    weighted = tl.zeros([P, B], tl.float32)
    for split in range(splits):
        place = (head * splits + split) * G
        part_most = tl.load(maxima + place + group, mask=group < G, other=float("-inf"))
        part_total = tl.load(totals + place + group, mask=group < G, other=0.0)
        part = tl.load(parts + place * D + group[:, None] * D + d[None, :], mask=live, other=0.0)
        higher = tl.maximum(most, part_most)
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # of parts without columns
        decay = tl.exp2(most - finite)
        factor = tl.exp2(part_most - finite)
        total = total * decay + part_total * factor
        weighted = weighted * decay[:, None] + part * factor[:, None]
        most = higher
    store_result(out + head * (G * D), total, weighted, group, d, D, G)
