"""The parts of a Llama-shaped layer between its matrix products, for one new token per row."""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..device.scalar_math import LOG2E
from ..runtime_jit import runtime_jit


@triton.jit
def aligned(pointer, offset):
    """Return pointer + offset, which begins at a boundary of 16 bytes: widths are multiples of 16 elements."""
    return tl.multiple_of(pointer + offset, [16])


@runtime_jit
def add_norm(hidden, delta, weight, out, width: tl.int32, epsilon: tl.float32, ADD: tl.constexpr, W: tl.constexpr):
    """Add `delta` to one row of `hidden`, in place, if ADD, and write its RMSNorm into `out`; all (rows, width)."""
    width = width // 16 * 16  # which tells the compiler
    at = tl.program_id(0).to(tl.int64) * width
    lane = tl.arange(0, W)
    inside = lane < width
    x = tl.load(aligned(hidden, at) + lane, mask=inside, other=0.0)
    if ADD:
        more = tl.load(aligned(delta, at) + lane, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(aligned(hidden, at) + lane, x, mask=inside)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / width
    w = tl.load(aligned(weight, 0) + lane, mask=inside, other=0.0).to(tl.float32)
    y = wide * tl.rsqrt(mean + epsilon) * w
    tl.store(aligned(out, at) + lane, y.to(out.dtype.element_ty), mask=inside)


@runtime_jit
def place_heads(
    qkv, cos, sin, q_norm, k_norm, query, keys, values, column, heads: tl.int32, key_heads: tl.int32, length: tl.int32,
    epsilon: tl.float32, D: tl.constexpr, B: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rotate one head of one row and put it in its place: a query into `query`, a key or value into the cache.

    qkv: (rows, heads + 2 key heads, D). cos, sin: (rows, D). q_norm, k_norm: (D,) weights of RMSNorms before the
    rotation, read if NORM. query: (rows, heads, D). keys, values: (rows, key heads, length, D). column: (1,) int64.
    """
    program = tl.program_id(0)
    every = heads + 2 * key_heads
    row, head = program // every, program % every
    d = tl.arange(0, B)
    inside = d < D
    other = tl.where(d < D // 2, d + D // 2, d - D // 2)
    source = qkv + program.to(tl.int64) * D
    x = tl.load(source + d, mask=inside, other=0.0).to(tl.float32)
    at_column = tl.load(column)
    if head >= heads + key_heads:
        at = (row.to(tl.int64) * key_heads + (head - heads - key_heads)) * length + at_column
        tl.store(values + at * D + d, x.to(values.dtype.element_ty), mask=inside)
    else:
        turned = tl.load(source + other, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            root = tl.rsqrt(tl.sum(x * x, 0) / D + epsilon)
            queries = tl.where(head < heads, D, 0)  # columns that take the weights of queries; the others take keys'
            q_weight = tl.load(q_norm + d, mask=d < queries, other=0.0).to(tl.float32)
            k_weight = tl.load(k_norm + d, mask=d < D - queries, other=0.0).to(tl.float32)
            q_other = tl.load(q_norm + other, mask=d < queries, other=0.0).to(tl.float32)
            k_other = tl.load(k_norm + other, mask=d < D - queries, other=0.0).to(tl.float32)
            x = x * root * (q_weight + k_weight)
            turned = turned * root * (q_other + k_other)
        c = tl.load(cos + row * D + d, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(sin + row * D + d, mask=inside, other=0.0).to(tl.float32)
        y = x * c + tl.where(d < D // 2, -turned, turned) * s
        if head < heads:
            at = row.to(tl.int64) * heads + head
            tl.store(query + at * D + d, y.to(query.dtype.element_ty), mask=inside)
        else:
            at = (row.to(tl.int64) * key_heads + (head - heads)) * length + at_column
            tl.store(keys + at * D + d, y.to(keys.dtype.element_ty), mask=inside)


@runtime_jit
def gate(gate_up, out, width: tl.int32, blocks: tl.int32, W: tl.constexpr):
    """Compute silu(gate) * up of one block of a row: gate_up (rows, 2 width), out (rows, width)."""
    width = width // 16 * 16  # which tells the compiler
    program = tl.program_id(0)
    row, lane = (program // blocks).to(tl.int64), program % blocks * W + tl.arange(0, W)
    inside = lane < width
    x = tl.load(aligned(gate_up, row * 2 * width) + lane, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(aligned(gate_up, row * 2 * width + width) + lane, mask=inside, other=0.0).to(tl.float32)
    y = x / (1 + tl.exp2(-x * LOG2E)) * up
    tl.store(aligned(out, row * width) + lane, y.to(out.dtype.element_ty), mask=inside)
