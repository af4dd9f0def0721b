"""Kernels of one program over the sequences of a loss: what all rows share, before, and the sums over rows, after.

A tile has S sequences and P positions in each. Both kernels add in an order that depends on the shapes alone.
"""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .. import codes
from .device.loss_arguments import (
    BOUNDS,
    COST_LIMIT,
    COST_LIMITS,
    COSTS,
    DIVISOR,
    IGNORED,
    LAM,
    MASK,
    MAX_LENGTH,
    NO_AGGREGATION,
    PACKED,
    SEQ_TOKEN_MEAN,
    SEQ_TOKEN_SUM_NORM,
    TOKEN_MEAN,
    TOKEN_SUM,
    TOTAL,
    at,
    bounds_of,
    hinge,
)
from .device.scalar_math import exp, expm1
from .runtime_jit import runtime_jit

UNSAFE, CLIPPED_LOW, CLIPPED_HIGH = (tl.constexpr(bit) for bit in (codes.UNSAFE, codes.CLIPPED_LOW, codes.CLIPPED_HIGH))
LOSS, ENTROPY, KL, LOG_RATIO = (tl.constexpr(codes.ROWS.index(name)) for name in ("loss", "entropy", "kl", "log_ratio"))
SEQUENCES, SEQUENCES_UNSAFE, HINGE_SUM, PENALTY_SUM, RATIO_MIN, RATIO_MAX = (
    tl.constexpr(codes.STATS.index(name))
    for name in ("sequences", "sequences_unsafe", "rectified_cost_sum", "penalty_sum", "ratio_min", "ratio_max")
)


@triton.jit
def tile_rows(begin, end, sequence, position, given, P: tl.constexpr):
    """Return the (rows, sequences, tokens, whether a row is in its sequence) of a tile, (S, P)."""
    row = begin[:, None] + (position + tl.arange(0, P)[None, :])
    token = row
    if given & PACKED == 0:
        token = row - begin[:, None]
    return row, sequence[:, None] + tl.zeros_like(row), token, row < end[:, None]


@triton.jit
def mark_outside(sequence_of, start, stop, BLOCK: tl.constexpr):
    """Write sequence -1 for rows from start to stop."""
    for first in range(start, stop, BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(sequence_of + row, tl.full([BLOCK], -1, tl.int32), mask=row < stop)


@triton.jit
def scalar_of(number, tensor, place: tl.constexpr, from_tensor):
    """Return the number or, where bit `place` of from_tensor is set, what the tensor holds."""
    value = number
    if (from_tensor >> place) & 1 != 0:
        value = tl.load(tensor)
    return value


@runtime_jit
def prepare(
    n0: tl.float32, n1: tl.float32, n2: tl.float32, n3: tl.float32, n4: tl.float32, n5: tl.float32, n6: tl.float32,
    n7: tl.float32, n8: tl.float32, n9: tl.float32, n10: tl.float32, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10,
    from_tensor: tl.int32, ids, ids_b: tl.int64, ids_t: tl.int64, mask, mask_b: tl.int64, mask_t: tl.int64, bounds,
    shared, counts, sequence_of, count: tl.int32, length: tl.int32, sequences: tl.int32, code: tl.int32,
    given: tl.int32, S: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Write the scalars and the divisor of the weights to `shared`, live tokens to `counts` (sequences,), at least 1,
    and the sequence of each packed row to `sequence_of` (count,), -1 outside the bounds.

    n0, ..., n10 are SCALARS as numbers, t0, ..., t10 as tensors; bit i of from_tensor says that t_i is given.
    """
    numbers, tensors = (n0, n1, n2, n3, n4, n5, n6, n7, n8, n9, n10), (t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10)
    for i in tl.static_range(TOTAL):
        tl.store(shared + i, scalar_of(numbers[i], tensors[i], i, from_tensor))
    aggregation, with_divisor = (code >> 8) & 7, (code >> 11) & 1
    counted = (aggregation != TOKEN_SUM) & (aggregation != NO_AGGREGATION)
    counted = counted & ((with_divisor == 0) | (aggregation == SEQ_TOKEN_MEAN))
    tokens, alive = tl.zeros([S], tl.int32), tl.zeros([S], tl.int32)
    if counted | (given & BOUNDS != 0):
        for first in range(0, sequences, S):
            sequence = first + tl.arange(0, S)
            begin, end = bounds_of(sequence, sequence < sequences, bounds, count, length, given)
            live = tl.zeros([S, P], tl.int32)
            for position in range(0, tl.max(end - begin, axis=0), P):
                row, of, token, inside = tile_rows(begin, end, sequence, position, given, P)
                target = tl.load(at((ids, ids_b, ids_t), of, token), mask=inside, other=IGNORED)
                unmasked = inside
                if given & MASK != 0:
                    unmasked = tl.load(at((mask, mask_b, mask_t), of, token), mask=inside, other=0) != 0
                live += ((target != IGNORED) & unmasked).to(tl.int32)
                if given & BOUNDS != 0:
                    tl.store(sequence_of + row, of, mask=inside)
            per_sequence = tl.sum(live, axis=1)
            tokens += per_sequence
            alive += (per_sequence > 0).to(tl.int32)
            if aggregation == SEQ_TOKEN_MEAN:
                tl.store(counts + sequence, tl.maximum(per_sequence, 1).to(tl.float32), mask=sequence < sequences)
    if given & BOUNDS != 0:
        mark_outside(sequence_of, 0, tl.minimum(tl.load(bounds), count), S * P)
        mark_outside(sequence_of, tl.maximum(tl.load(bounds + sequences), 0), count, S * P)
    outer = tl.where(aggregation == TOKEN_MEAN, tl.sum(tokens, axis=0), tl.sum(alive, axis=0))
    total = tl.where(counted, tl.maximum(outer, 1).to(tl.float32), 1.0)
    total = tl.where(with_divisor != 0, scalar_of(n9, t9, DIVISOR, from_tensor), total)
    max_length = scalar_of(n10, t10, MAX_LENGTH, from_tensor)
    total = tl.where(aggregation == SEQ_TOKEN_SUM_NORM, max_length * total, total)
    tl.store(shared + TOTAL, total)


@triton.jit
def larger(running, value):
    """Return the larger of two, any shape; NaN if either is NaN."""
    return tl.where((value > running) | (value != value), value, running)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """Return the largest element along an axis; NaN if there is one."""
    return tl.where(tl.max((x != x).to(tl.int32), axis=AXIS) > 0, float("nan"), tl.max(x, axis=AXIS))


@triton.jit
def sum_tile(x):
    """Sum a tile (S, P) to a scalar."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@runtime_jit
def reduce(
    rows, flags, costs, costs_b: tl.int64, costs_t: tl.int64, limits, limits_b: tl.int64, limits_t: tl.int64, bounds,
    shared, loss, stats, count: tl.int32, length: tl.int32, sequences: tl.int32, given: tl.int32, S: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """Sum rows (5, count) of the live tokens and {C - d}^+ of their sequences to the loss and its statistics."""
    zero = tl.zeros([S, P], tl.float32)
    entropy, kl, tokens, unsafe, loss_sum = zero, zero, zero, zero, zero
    low_safe, low_unsafe, high_safe, high_unsafe = zero, zero, zero, zero
    ratio_sum, ratio_square, k1, k3 = zero, zero, zero, zero
    lowest, highest = zero + float("-inf"), zero + float("-inf")  # of -rho and rho
    alive, alive_unsafe, hinge_sum = tl.zeros([S], tl.float32), tl.zeros([S], tl.float32), tl.zeros([S], tl.float32)
    common_limit = tl.load(shared + COST_LIMIT)
    for first in range(0, sequences, S):
        sequence = first + tl.arange(0, S)
        begin, end = bounds_of(sequence, sequence < sequences, bounds, count, length, given)
        excess, seen = zero, zero
        for position in range(0, tl.max(end - begin, axis=0), P):
            row, of, token, inside = tile_rows(begin, end, sequence, position, given, P)
            bits = tl.load(flags + row, mask=inside, other=0)
            live = bits != 0
            one = live.to(tl.float32)
            log_ratio = tl.load(rows + LOG_RATIO * count + row, mask=live, other=0.0)
            ratio = exp(log_ratio)
            bad = (bits & UNSAFE != 0).to(tl.float32)
            low, high = (bits & CLIPPED_LOW != 0).to(tl.float32), (bits & CLIPPED_HIGH != 0).to(tl.float32)
            loss_sum += tl.load(rows + LOSS * count + row, mask=live, other=0.0)
            entropy += tl.load(rows + ENTROPY * count + row, mask=live, other=0.0)
            kl += tl.load(rows + KL * count + row, mask=live, other=0.0)
            tokens += one
            unsafe += bad
            low_safe += low * (1 - bad)
            low_unsafe += low * bad
            high_safe += high * (1 - bad)
            high_unsafe += high * bad
            ratio_sum += ratio * one
            ratio_square += ratio * ratio * one
            k1 -= log_ratio
            k3 += expm1(log_ratio) - log_ratio
            lowest = larger(lowest, tl.where(live, -ratio, float("-inf")))
            highest = larger(highest, tl.where(live, ratio, float("-inf")))
            seen = tl.maximum(seen, one)
            if given & COSTS != 0:
                cost = tl.load(at((costs, costs_b, costs_t), of, token), mask=live, other=float("-inf"))
                limit = zero + common_limit
                if given & COST_LIMITS != 0:
                    limit = tl.load(at((limits, limits_b, limits_t), of, token), mask=live, other=0.0)
                excess = larger(excess, hinge(cost, limit))
        top = largest(excess, 1)
        alive += tl.max(seen, axis=1)
        alive_unsafe += (top > 0).to(tl.float32)
        hinge_sum += top
    tl.store(loss, sum_tile(loss_sum))
    sums = (entropy, kl, tokens, unsafe, low_safe, low_unsafe, high_safe, high_unsafe, ratio_sum, ratio_square, k1, k3)
    for i in tl.static_range(12):
        tl.store(stats + i, sum_tile(sums[i]))
    hinges = tl.sum(hinge_sum, axis=0)
    tl.store(stats + SEQUENCES, tl.sum(alive, axis=0))
    tl.store(stats + SEQUENCES_UNSAFE, tl.sum(alive_unsafe, axis=0))
    tl.store(stats + HINGE_SUM, hinges)
    tl.store(stats + PENALTY_SUM, tl.load(shared + LAM) * hinges)
    some = sum_tile(tokens) > 0
    smallest_ratio, largest_ratio = -largest(largest(lowest, 1), 0), largest(largest(highest, 1), 0)
    tl.store(stats + RATIO_MIN, tl.where(some, smallest_ratio, 1.0))
    tl.store(stats + RATIO_MAX, tl.where(some, largest_ratio, 1.0))
