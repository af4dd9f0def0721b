"""The kernels, one program per row: `fused` takes all steps (statistics, token terms, gradient) in one launch.

Only dtypes and upper-case arguments are compiled in: no argument is specialised on its value or alignment.
"""
# ruff: noqa: N803, N806 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import inspect
from typing import Any

import triton
import triton.language as tl

from .. import interface
from .held_row import held_statistics, hold, store_held
from .row_gradient import factors, target_gradient
from .row_layout import aligned, block_pointers, edge_columns, peel, row_offset, target_piece
from .row_statistics import empty_lanes, meet, prepare
from .row_sweeps import gradient_of, load_edges, scale_row, sweep_gradient, sweep_statistics, zero_row
from .scalar_math import LOG2E
from .token_terms import ENTROPY_GRADIENT, ENTROPY_NONE, TEMPERATURE, TOKENS, row_inputs, token_terms

IGNORED = tl.constexpr(interface.IGNORED)
STATE = tl.constexpr(len(interface.STATE))


def runtime_jit(function: Any) -> Any:
    """Apply `triton.jit` without specialisation on the value or the alignment of run-time arguments."""
    names = [name for name, p in inspect.signature(function).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


@triton.jit
def read_target(pointer, target, columns, softcap, SOFTCAP: tl.constexpr):
    """Read the target's logit, raw and after the softcap; NaN for an id outside the row, which is no valid address."""
    valid = (target >= 0) & (target < columns)
    x = tl.load(pointer + tl.where(valid, target, 0)).to(tl.float32)
    x = tl.where(valid, x, float("nan"))
    z, _ = prepare(x, None, softcap, 1 / softcap if SOFTCAP else softcap, SOFTCAP, False)
    return x, z


@triton.jit
def zero_column(matrix, row, count, ROWS: tl.constexpr):
    """Fill one column of a matrix (ROWS, count) with zeros, ROWS <= 16."""
    lane = tl.arange(0, 16)
    tl.store(matrix + row + lane * count, tl.zeros([16], tl.float32), mask=lane < ROWS)


@triton.jit
def open_row(pointer, ref_pointer, target, columns, scalars, softcap, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr):
    """Read everything of a live row but its pieces: (place, edges, target's logits, scales)."""
    E: tl.constexpr = 128 // pointer.dtype.element_ty.primitive_bitwidth
    head, pieces = peel(pointer, columns)
    y = tl.maximum(tl.minimum(target, columns), -1).to(tl.int32)
    hole = target_piece(y, head, pieces, E)
    temperature = tl.load(scalars + TEMPERATURE)
    column, live = edge_columns(y, hole, head, pieces, columns, E)
    edges = load_edges(pointer, column, live)
    x_y, z_y = read_target(pointer, y, columns, softcap, SOFTCAP)
    ref_edges, ref_z_y = edges, z_y
    if FULL_KL:
        ref_edges = load_edges(ref_pointer, column, live)
        _, ref_z_y = read_target(ref_pointer, y, columns, softcap, SOFTCAP)
    inverse_softcap = 1 / softcap if SOFTCAP else softcap
    place = (pointer, head, pieces, hole, tl.minimum(tl.maximum(y, 0), columns - 1))
    scales = (temperature, tl.fdiv(LOG2E, temperature), inverse_softcap)
    return place, (column, live, edges, ref_edges), (x_y, z_y, ref_z_y), scales


@triton.jit
def close_row(lanes, start, softcap, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr):
    """Compute the row's statistics from its lanes, edges and target."""
    _, at_edges, at_target, scales = start
    _, live, edges, ref_edges = at_edges
    _, z_y, ref_z_y = at_target
    _, scale, inverse_softcap = scales
    FINITE: tl.constexpr = ENTROPY or FULL_KL
    z, _ = prepare(edges, live, softcap, inverse_softcap, SOFTCAP, FINITE)
    ref_z = z
    if FULL_KL:
        ref_z, _ = prepare(ref_edges, live, softcap, inverse_softcap, SOFTCAP, FINITE)
    return meet(lanes, z, ref_z, z_y, ref_z_y, scale, ENTROPY, FULL_KL)


@triton.jit
def store_ends(start, grad_pointer, state, slopes, factor, softcap, IN_GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr,
               FULL_KL: tl.constexpr):  # fmt: skip
    """Write the gradient of the edges and of the target."""
    place, edge_values, target_values, scales = start
    column, live, edges, ref_edges = edge_values
    x_y, _, ref_z_y = target_values
    temperature, scale, inverse_softcap = scales
    DTYPE: tl.constexpr = grad_pointer.dtype.element_ty
    at_edges = gradient_of(edges, ref_edges, factor, state[3], state[5], scale, softcap, inverse_softcap,
                           IN_GRADIENT, SOFTCAP, FULL_KL)  # fmt: skip
    tl.store(grad_pointer + column, at_edges.to(DTYPE), mask=live)
    at_target = target_gradient(x_y, ref_z_y, state, slopes, softcap, scale, temperature, IN_GRADIENT, SOFTCAP,
                                FULL_KL)  # fmt: skip
    tl.store(grad_pointer + place[4], at_target.to(DTYPE))


@runtime_jit
def fused(
    logits, ref_logits, grad, ids, values, scalars, losses, tokens,
    count: tl.int32, length: tl.int32, stride_b: tl.int64, stride_t: tl.int64, ref_stride_b: tl.int64,
    ref_stride_t: tl.int64, grad_stride_b: tl.int64, grad_stride_t: tl.int64, columns: tl.int32, code: tl.int32,
    softcap: tl.float32, entropy_mode: tl.int32, want_grad: tl.int32,
    R: tl.constexpr, HELD: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr,
):  # fmt: skip
    """Compute loss, token values and gradient of one row.

    HELD = 0: the row is read twice, the second time backwards. HELD = 1 or 3: it has at most HELD blocks and stays in
    registers; softcap, full KL and the entropy's gradient are excluded then.
    """
    DTYPE: tl.constexpr = logits.dtype.element_ty
    E: tl.constexpr = 128 // DTYPE.primitive_bitwidth
    IN_GRADIENT: tl.constexpr = ENTROPY == ENTROPY_GRADIENT
    row = tl.program_id(0)
    target = tl.load(ids + row)
    x_row = logits + row_offset(row, length, stride_b, stride_t)
    g_row = grad + row_offset(row, length, grad_stride_b, grad_stride_t)
    if target == IGNORED:
        tl.store(losses + row, 0.0)
        zero_column(tokens, row, count, TOKENS)
        if want_grad != 0:
            head, pieces = peel(x_row, columns)
            zero_row(g_row, head, pieces, columns, R, E)
    else:
        ref_row = ref_logits + row_offset(row, length, ref_stride_b, ref_stride_t) if FULL_KL else x_row
        start = open_row(x_row, ref_row, target, columns, scalars, softcap, SOFTCAP, FULL_KL)
        place, _, _, scales = start
        temperature, scale, inverse_softcap = scales
        _, head, pieces, hole, _ = place
        if HELD > 0:
            x0, x1, x2 = hold(aligned(x_row, head), hole, pieces, R, HELD)
        inputs = row_inputs(values, scalars, row, count, code)
        lanes = empty_lanes(scale, R)
        if HELD > 0:
            if pieces > 0:
                lanes = held_statistics(lanes, x0, scale, DTYPE, ENTROPY)
            if HELD == 3:
                if pieces > R:
                    lanes = held_statistics(lanes, x1, scale, DTYPE, ENTROPY)
                if pieces > 2 * R:
                    lanes = held_statistics(lanes, x2, scale, DTYPE, ENTROPY)
        else:
            lanes = sweep_statistics(lanes, place, ref_row, scale, softcap, inverse_softcap, R, E, "evict_last",
                                     ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip
        logp, entropy, kl, max2, log2_sum, ref_max2, ref_log2_sum, total = close_row(
            lanes, start, softcap, ENTROPY, SOFTCAP, FULL_KL
        )
        slopes = token_terms(inputs, logp, entropy, kl, scalars, code, entropy_mode, losses, tokens, row, count)
        if want_grad != 0:
            state = (logp, entropy, kl, max2, log2_sum, ref_max2, ref_log2_sum)
            factor = factors(state, slopes, 1 / total, temperature, IN_GRADIENT, FULL_KL)
            if HELD > 0:
                grad_pointers = block_pointers(aligned(g_row, head), R, E)
                if pieces > 0:
                    store_held(grad_pointers, x0, 0, hole, pieces, factor, max2, scale)
                if HELD == 3:
                    if pieces > R:
                        store_held(grad_pointers, x1, 1, hole, pieces, factor, max2, scale)
                    if pieces > 2 * R:
                        store_held(grad_pointers, x2, 2, hole, pieces, factor, max2, scale)
            else:
                sweep_gradient(place, ref_row, g_row, factor, max2, ref_max2, scale, softcap, inverse_softcap, R, E,
                               IN_GRADIENT, SOFTCAP, FULL_KL)  # fmt: skip
            store_ends(start, g_row, state, slopes, factor, softcap, IN_GRADIENT, SOFTCAP, FULL_KL)


@runtime_jit
def statistics(
    logits, ref_logits, ids, scalars, state,
    count: tl.int32, length: tl.int32, stride_b: tl.int64, stride_t: tl.int64, ref_stride_b: tl.int64,
    ref_stride_t: tl.int64, columns: tl.int32, softcap: tl.float32, entropy_mode: tl.int32,
    R: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr,
):  # fmt: skip
    """Compute one row's column of the state (7, N); its logits are read once."""
    E: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0)
    target = tl.load(ids + row)
    if target == IGNORED:
        zero_column(state, row, count, STATE)
    else:
        x_row = logits + row_offset(row, length, stride_b, stride_t)
        ref_row = ref_logits + row_offset(row, length, ref_stride_b, ref_stride_t) if FULL_KL else x_row
        start = open_row(x_row, ref_row, target, columns, scalars, softcap, SOFTCAP, FULL_KL)
        place, _, _, scales = start
        _, scale, inverse_softcap = scales
        lanes = empty_lanes(scale, R)
        lanes = sweep_statistics(lanes, place, ref_row, scale, softcap, inverse_softcap, R, E, "evict_first",
                                 ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip
        logp, entropy, kl, max2, log2_sum, ref_max2, ref_log2_sum, _ = close_row(
            lanes, start, softcap, ENTROPY, SOFTCAP, FULL_KL
        )
        state += row
        tl.store(state, logp)
        tl.store(state + count, tl.where(entropy_mode != ENTROPY_NONE, entropy, 0.0))
        tl.store(state + 2 * count, kl)
        tl.store(state + 3 * count, max2)
        tl.store(state + 4 * count, log2_sum)
        tl.store(state + 5 * count, ref_max2)
        tl.store(state + 6 * count, ref_log2_sum)


@runtime_jit
def apply(
    logits, ref_logits, grad, ids, state, slopes, scalars,
    count: tl.int32, length: tl.int32, stride_b: tl.int64, stride_t: tl.int64, ref_stride_b: tl.int64,
    ref_stride_t: tl.int64, grad_stride_b: tl.int64, grad_stride_t: tl.int64, columns: tl.int32, softcap: tl.float32,
    R: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr,
):  # fmt: skip
    """Compute one row of the gradient from its column of the state (7, N) and of the slopes (3, N)."""
    E: tl.constexpr = 128 // logits.dtype.element_ty.primitive_bitwidth
    IN_GRADIENT: tl.constexpr = ENTROPY == ENTROPY_GRADIENT
    row = tl.program_id(0)
    target = tl.load(ids + row)
    x_row = logits + row_offset(row, length, stride_b, stride_t)
    g_row = grad + row_offset(row, length, grad_stride_b, grad_stride_t)
    if target == IGNORED:
        head, pieces = peel(x_row, columns)
        zero_row(g_row, head, pieces, columns, R, E)
    else:
        ref_row = ref_logits + row_offset(row, length, ref_stride_b, ref_stride_t) if FULL_KL else x_row
        start = open_row(x_row, ref_row, target, columns, scalars, softcap, SOFTCAP, FULL_KL)
        state_row = (
            tl.load(state + row),
            tl.load(state + row + count),
            tl.load(state + row + 2 * count),
            tl.load(state + row + 3 * count),
            tl.load(state + row + 4 * count),
            tl.load(state + row + 5 * count),
            tl.load(state + row + 6 * count),
        )
        slopes_row = tl.load(slopes + row), tl.load(slopes + row + count), tl.load(slopes + row + 2 * count)
        factor = factors(state_row, slopes_row, tl.exp2(-state_row[4]), start[3][0], IN_GRADIENT, FULL_KL)
        sweep_gradient(start[0], ref_row, g_row, factor, state_row[3], state_row[5], start[3][1], softcap, start[3][2],
                       R, E, IN_GRADIENT, SOFTCAP, FULL_KL)  # fmt: skip
        store_ends(start, g_row, state_row, slopes_row, factor, softcap, IN_GRADIENT, SOFTCAP, FULL_KL)


@runtime_jit
def scale(
    grad, upstream, upstream_stride: tl.int64, length: tl.int32, grad_stride_b: tl.int64, grad_stride_t: tl.int64,
    columns: tl.int32, R: tl.constexpr,
):  # fmt: skip
    """Multiply one row by its upstream gradient; a row whose factor is 1 is not touched."""
    E: tl.constexpr = 128 // grad.dtype.element_ty.primitive_bitwidth
    row = tl.program_id(0)
    factor = tl.load(upstream + row * upstream_stride)
    if factor != 1.0:
        g_row = grad + row_offset(row, length, grad_stride_b, grad_stride_t)
        head, pieces = peel(g_row, columns)
        scale_row(g_row, head, pieces, columns, factor, R, E)
