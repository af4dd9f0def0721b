"""Inversion of the cumulative distribution in two levels: blocks of a row first, then the columns of one block.

Weights are e^(z - max) in fp32, as a softmax has them before its division; every sum is in fp64.
"""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from ..device.scalar_math import exp
from ..runtime_jit import runtime_jit

LEAST = tl.constexpr(-100.0)  # e^x below counts as 0: it is less than fp32 holds with full precision


@triton.jit
def scaled(logits, temperature, first, columns, W: tl.constexpr, E: tl.constexpr):
    """Load the block of W columns from `first`, divided by the temperature; -inf outside the row.

    E: elements in 16 bytes where rows begin at such boundaries and have a multiple of them, else 1.
    """
    lane = tl.arange(0, W)
    block = logits + first
    if E > 1:
        columns = columns // E * E  # which tells the compiler
        block = tl.multiple_of(block, [16])
    x = tl.load(block + lane, mask=first + lane < columns, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, tl.full([W], 1.0, tl.float32) * temperature)


@triton.jit
def weights_of(z, most):
    """Compute e^(z - most) in fp32, as fp64."""
    low = z - most
    return tl.where(low > LEAST, exp(tl.maximum(low, LEAST)), 0.0).to(tl.float64)


@triton.jit
def or_zero(most):
    """Replace -inf, the maximum of a block without possible tokens, by 0."""
    return tl.where(most == float("-inf"), 0.0, most)


@runtime_jit
def block_sums(
    logits, sums, stride: tl.int64, columns: tl.int32, blocks: tl.int32, temperature: tl.float32, W: tl.constexpr,
    E: tl.constexpr,
):  # fmt: skip
    """Write maximum and sum of weights of one block: sums (rows, 2, blocks) fp64."""
    program = tl.program_id(0)
    row, block = program // blocks, program % blocks
    z = scaled(logits + row.to(tl.int64) * stride, temperature, block * W, columns, W, E)
    most = or_zero(tl.max(z, 0))
    at = sums + row * (2 * blocks) + block
    tl.store(at, most.to(tl.float64))
    tl.store(at + blocks, tl.sum(weights_of(z, most), 0))


@runtime_jit
def choose(
    logits, sums, uniforms, tokens, logps, stride: tl.int64, uniform_stride: tl.int64, columns: tl.int32,
    blocks: tl.int32, temperature: tl.float32, W: tl.constexpr, E: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Choose the token of one row and write it with its log-probability. B: blocks, padded to a power of two."""
    row = tl.program_id(0)
    lane = tl.arange(0, B)
    at = sums + row * (2 * blocks) + lane
    maxima = tl.load(at, mask=lane < blocks, other=float("-inf"))
    shares = tl.load(at + blocks, mask=lane < blocks, other=0.0)
    most = tl.max(tl.where(shares > 0.0, maxima, float("-inf")), 0)
    factors = tl.where(shares > 0.0, tl.exp(maxima - most), 0.0)
    shares = shares * factors
    cumulative = tl.cumsum(shares, 0)
    total = tl.max(cumulative, 0)
    threshold = tl.load(uniforms + row.to(tl.int64) * uniform_stride).to(tl.float64) * total
    # rounding may leave a threshold that no sum exceeds: then the last possible block, and the last possible token
    block = tl.sum(((cumulative <= threshold) & (lane < blocks)).to(tl.int32), 0)
    block = tl.minimum(block, tl.max(tl.where(shares > 0.0, lane, 0), 0))
    before = tl.sum(tl.where(lane == block - 1, cumulative, 0.0), 0)
    factor = tl.sum(tl.where(lane == block, factors, 0.0), 0)
    block_most = tl.sum(tl.where(lane == block, maxima, 0.0), 0)
    rest = (threshold - before) / tl.where(factor > 0.0, factor, 1.0)
    z = scaled(logits + row.to(tl.int64) * stride, temperature, block * W, columns, W, E)
    weights = weights_of(z, block_most.to(tl.float32))
    column = tl.arange(0, W)
    inside = tl.sum((tl.cumsum(weights, 0) <= rest).to(tl.int32), 0)
    inside = tl.minimum(inside, tl.max(tl.where(weights > 0.0, column, 0), 0))
    z_token = tl.sum(tl.where(column == inside, z, 0.0), 0).to(tl.float64)
    tl.store(tokens + row, (block * W + inside).to(tl.int64))
    tl.store(logps + row, (z_token - most - tl.log(total)).to(tl.float32))
