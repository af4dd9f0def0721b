"""The kernels, one program per row: `fused` takes all steps (statistics, token terms, gradient) in one launch.

Only dtypes and upper-case arguments are compiled in: no argument is specialised on its value or alignment.
"""
# ruff: noqa: N803, N806 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .. import codes
from . import forms
from .device.first_block import first_gradient, first_statistics, load_first, rest_of
from .device.loss_arguments import FLAGS, IGNORED, INDEX, MASK, UPSTREAM, at, place_of, row_temperature, usable
from .device.row_gradient import factors, target_gradient
from .device.row_layout import edge_columns, peel, row_offset, target_piece
from .device.row_statistics import empty_lanes, meet, prepare
from .device.row_sweeps import gradient_of, load_edges, scale_row, sweep_gradient, sweep_statistics, zero_row
from .device.scalar_math import LOG2E
from .device.token_terms import ENTROPY_GRADIENT, ENTROPY_NONE, row_inputs, row_weights, store_row, token_terms
from .runtime_jit import runtime_jit

STATE = tl.constexpr(len(codes.STATE))
SWEPT, KEPT, PERSISTENT = (tl.constexpr(form) for form in (forms.SWEPT, forms.KEPT, forms.PERSISTENT))


@triton.jit
def row_of(i, first, index, ids, mask, sequence_of, length, given, exists):
    """Return (row of the loss, sequence, token within it, target, whether it is live) of row i of the logits."""
    row = first + i
    if given & INDEX != 0:
        row = tl.load(index + i, mask=exists, other=0).to(tl.int32)
    sequence, token = place_of(row, sequence_of, length, given, exists)
    alive = (sequence >= 0) & exists
    target = tl.load(at(ids, sequence, token), mask=alive, other=IGNORED)
    alive = target != IGNORED
    if given & MASK != 0:
        alive = alive & (tl.load(at(mask, sequence, token), mask=alive, other=0) != 0)
    return row, sequence, token, target, alive


@triton.jit
def read_target(pointer, target, columns, softcap, SOFTCAP: tl.constexpr):
    """Read the target's logit, raw and after the softcap; NaN for an id outside the row, which is no valid address."""
    valid = (target >= 0) & (target < columns)
    x = tl.load(pointer + tl.where(valid, target, 0)).to(tl.float32)
    x = tl.where(valid, x, float("nan"))
    z, _ = prepare(x, None, softcap, 1 / softcap if SOFTCAP else softcap, SOFTCAP, False)
    return x, z


@triton.jit
def open_row(pointer, ref_pointer, target, columns, temperature, softcap, E: tl.constexpr, SOFTCAP: tl.constexpr,
             FULL_KL: tl.constexpr):  # fmt: skip
    """Read everything of a live row but its pieces: (place, edges, target's logits, scales)."""
    head, pieces = peel(pointer, columns, E)
    y = tl.maximum(tl.minimum(target, columns), -1).to(tl.int32)
    hole = target_piece(y, head, pieces, E)
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
    _, at_edges, targets, scales = start
    _, live, edges, ref_edges = at_edges
    _, z_y, ref_z_y = targets
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
    place, at_edges, targets, scales = start
    column, live, edges, ref_edges = at_edges
    x_y, _, ref_z_y = targets
    temperature, scale, inverse_softcap = scales
    DTYPE: tl.constexpr = grad_pointer.dtype.element_ty
    values = gradient_of(edges, ref_edges, factor, state[3], state[5], scale, softcap, inverse_softcap,
                           IN_GRADIENT, SOFTCAP, FULL_KL)  # fmt: skip
    tl.store(grad_pointer + column, values.to(DTYPE), mask=live)
    at_target = target_gradient(x_y, ref_z_y, state, slopes, softcap, scale, temperature, IN_GRADIENT, SOFTCAP,
                                FULL_KL)  # fmt: skip
    tl.store(grad_pointer + place[4], at_target.to(DTYPE))


@triton.jit
def take_row(i, ahead, rows_of, logits_of, ref_of, grad_of, values, results, options, R: tl.constexpr, E: tl.constexpr,
             ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr, FULL_KL: tl.constexpr, FORM: tl.constexpr):  # fmt: skip
    """Compute results and gradient of row i of the logits; return the first block of the next one if PERSISTENT.

    The arguments are those of `fused`, in groups. ahead: the first block of this row if PERSISTENT.
    """
    IN_GRADIENT: tl.constexpr = ENTROPY == ENTROPY_GRADIENT
    first, many, index, at_ids, at_mask, sequence_of, loss_length, given = rows_of
    logits, length, stride_b, stride_t, columns = logits_of
    ref_logits, ref_stride_b, ref_stride_t = ref_of
    grad, grad_stride_b, grad_stride_t, want_grad = grad_of
    shared, counts, upstream, rows, flags, count = results
    code, softcap, entropy_mode = options
    row, sequence, token, target, alive = row_of(
        i, first, index, at_ids, at_mask, sequence_of, loss_length, given, True
    )
    x_row = logits + row_offset(i, length, stride_b, stride_t)
    g_row = grad + row_offset(i, length, grad_stride_b, grad_stride_t)
    next_pieces, next_head, next_row = 0, 0, x_row
    if FORM == PERSISTENT:
        after = i + tl.num_programs(0)
        following = row_of(after, first, index, at_ids, at_mask, sequence_of, loss_length, given, after < many)
        next_row = logits + row_offset(after, length, stride_b, stride_t)
        next_head, next_pieces = peel(next_row, columns, E)
        next_pieces = tl.where(following[4], next_pieces, 0)
    if alive == 0:
        store_row(rows, row, count, 0.0, 0.0, 0.0, 0.0, 0.0)
        tl.store(flags + row, 0)
        if want_grad != 0:
            head, pieces = peel(x_row, columns, E)
            zero_row(g_row, head, pieces, columns, R, E)
        if FORM == PERSISTENT:
            ahead = load_first(next_row, next_head, next_pieces, R, E)
    else:
        ref_row = ref_logits + row_offset(i, length, ref_stride_b, ref_stride_t) if FULL_KL else x_row
        rewards, cost_advantages, costs, limits, baselines, old_logps, ref_logps, importance, temperatures = values
        temperature = row_temperature(temperatures, shared, sequence, token, given)
        opened = open_row(x_row, ref_row, target, columns, temperature, softcap, E, SOFTCAP, FULL_KL)
        place = opened[0]
        scale, inverse_softcap = opened[3][1], opened[3][2]
        inputs = row_inputs(
            rewards, cost_advantages, costs, limits, baselines, old_logps, ref_logps, shared, sequence, token, code,
            given,
        )  # fmt: skip
        lanes = empty_lanes(scale, R)
        swept = place if FORM == SWEPT else rest_of(place, R, E)
        if FORM == PERSISTENT:
            lanes = first_statistics(lanes, ahead, place, scale, ENTROPY)
        lanes = sweep_statistics(lanes, swept, ref_row, scale, softcap, inverse_softcap, R, E, "evict_last",
                                 ENTROPY, SOFTCAP, FULL_KL)  # fmt: skip
        kept = 0.0
        if FORM == KEPT:
            kept = load_first(x_row, place[1], place[2], R, E)
            lanes = first_statistics(lanes, kept, place, scale, ENTROPY)
        logp, entropy, kl, max2, log2_sum, ref_max2, ref_log2_sum, total = close_row(
            lanes, opened, softcap, ENTROPY, SOFTCAP, FULL_KL
        )
        # loaded here and not with the inputs: two registers less during the sweep
        weights = row_weights(importance, shared, counts, sequence, token, code, given)
        slopes = token_terms(inputs, weights, logp, entropy, kl, shared, code, entropy_mode, rows, flags, row, count)
        state = (logp, entropy, kl, max2, log2_sum, ref_max2, ref_log2_sum)
        g_logp, g_entropy, g_kl = slopes
        by = tl.load(upstream + row, mask=given & UPSTREAM != 0, other=1.0)
        slopes = g_logp * by, g_entropy * by, g_kl * by
        factor = factors(state, slopes, tl.fdiv(1.0, total), temperature, IN_GRADIENT, FULL_KL)
        if want_grad != 0:
            if FORM == KEPT:
                first_gradient(kept, place, g_row, factor, max2, scale, R, E, IN_GRADIENT)
            sweep_gradient(swept, ref_row, g_row, factor, max2, ref_max2, scale, softcap, inverse_softcap, R, E,
                           IN_GRADIENT, SOFTCAP, FULL_KL)  # fmt: skip
            store_ends(opened, g_row, state, slopes, factor, softcap, IN_GRADIENT, SOFTCAP, FULL_KL)
        if FORM == PERSISTENT:
            # the next row is on its way while the last block of this one is written
            again = load_first(x_row, place[1], place[2], R, E)
            ahead = load_first(next_row, next_head, next_pieces, R, E)
            if want_grad != 0:
                first_gradient(again, place, g_row, factor, max2, scale, R, E, IN_GRADIENT)
    return ahead


@runtime_jit
def fused(
    logits, ref_logits, grad, ids, ids_b: tl.int64, ids_t: tl.int64, mask, mask_b: tl.int64, mask_t: tl.int64,
    sequence_of, rewards, rewards_b: tl.int64, rewards_t: tl.int64, cost_advantages, cost_advantages_b: tl.int64,
    cost_advantages_t: tl.int64, costs, costs_b: tl.int64, costs_t: tl.int64, limits, limits_b: tl.int64,
    limits_t: tl.int64, baselines, baselines_b: tl.int64, baselines_t: tl.int64, old_logps, old_logps_b: tl.int64,
    old_logps_t: tl.int64, ref_logps, ref_logps_b: tl.int64, ref_logps_t: tl.int64, importance, importance_b: tl.int64,
    importance_t: tl.int64, temperatures, temperatures_b: tl.int64, temperatures_t: tl.int64, upstream, index, shared,
    counts, rows, flags,
    first: tl.int32, many: tl.int32, count: tl.int32, loss_length: tl.int32, length: tl.int32, stride_b: tl.int64,
    stride_t: tl.int64, ref_stride_b: tl.int64, ref_stride_t: tl.int64, grad_stride_b: tl.int64,
    grad_stride_t: tl.int64, columns: tl.int32, code: tl.int32, given: tl.int32, softcap: tl.float32,
    entropy_mode: tl.int32,
    want_grad: tl.int32, R: tl.constexpr, E: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
    FULL_KL: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Compute results and gradient of rows of the logits, one a program; with FORM = PERSISTENT, several.

    A row is read twice, the second time backwards. Row i of `many` has the arguments and results of row `first` + i of
    the loss, or of row `index`[i].
    """
    rows_of = (first, many, index, (ids, ids_b, ids_t), (mask, mask_b, mask_t), sequence_of, loss_length, given)
    logits_of = (logits, length, stride_b, stride_t, columns)
    ref_of = (ref_logits, ref_stride_b, ref_stride_t)
    grad_of = (grad, grad_stride_b, grad_stride_t, want_grad)
    values = (
        (rewards, rewards_b, rewards_t), (cost_advantages, cost_advantages_b, cost_advantages_t),
        (costs, costs_b, costs_t), (limits, limits_b, limits_t), (baselines, baselines_b, baselines_t),
        (old_logps, old_logps_b, old_logps_t), (ref_logps, ref_logps_b, ref_logps_t),
        (importance, importance_b, importance_t), (temperatures, temperatures_b, temperatures_t),
    )  # fmt: skip
    results = (shared, counts, upstream, rows, flags, count)
    options = (code, softcap, entropy_mode)
    start = tl.program_id(0)
    if FORM == PERSISTENT:
        earliest = row_of(start, first, index, rows_of[3], rows_of[4], sequence_of, loss_length, given, start < many)
        first_row = logits + row_offset(start, length, stride_b, stride_t)
        head, pieces = peel(first_row, columns, E)
        ahead = load_first(first_row, head, tl.where(earliest[4], pieces, 0), R, E)
        for i in range(start, many, tl.num_programs(0)):
            ahead = take_row(i, ahead, rows_of, logits_of, ref_of, grad_of, values, results, options, R, E, ENTROPY,
                             SOFTCAP, FULL_KL, FORM)  # fmt: skip
    else:
        take_row(start, 0.0, rows_of, logits_of, ref_of, grad_of, values, results, options, R, E, ENTROPY, SOFTCAP,
                 FULL_KL, FORM)  # fmt: skip


@runtime_jit
def statistics(
    logits, ids, temperatures, temperatures_t: tl.int64, state, count: tl.int32, length: tl.int32, stride_b: tl.int64,
    stride_t: tl.int64, columns: tl.int32, softcap: tl.float32, entropy_mode: tl.int32, R: tl.constexpr,
    E: tl.constexpr, ENTROPY: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Compute one row's column of the state (7, N); its logits are read once. temperatures_t: 0 where all have one."""
    row = tl.program_id(0)
    target = tl.load(ids + row)
    state += row
    if target == IGNORED:
        lane = tl.arange(0, 8)
        tl.store(state + lane * count, tl.zeros([8], tl.float32), mask=lane < STATE)
    else:
        x_row = logits + row_offset(row, length, stride_b, stride_t)
        temperature = usable(tl.load(temperatures + row * temperatures_t))
        start = open_row(x_row, x_row, target, columns, temperature, softcap, E, SOFTCAP, False)
        place, _, _, scales = start
        _, scale, inverse_softcap = scales
        lanes = empty_lanes(scale, R)
        lanes = sweep_statistics(lanes, place, x_row, scale, softcap, inverse_softcap, R, E, "evict_first",
                                 ENTROPY, SOFTCAP, False)  # fmt: skip
        logp, entropy, _, max2, log2_sum, _, _, _ = close_row(lanes, start, softcap, ENTROPY, SOFTCAP, False)
        tl.store(state, logp)
        tl.store(state + count, tl.where(entropy_mode != ENTROPY_NONE, entropy, 0.0))
        tl.store(state + 2 * count, 0.0)
        tl.store(state + 3 * count, max2)
        tl.store(state + 4 * count, log2_sum)
        tl.store(state + 5 * count, 0.0)
        tl.store(state + 6 * count, 0.0)


@runtime_jit
def apply(
    logits, grad, ids, state, slopes, temperatures, temperatures_t: tl.int64, count: tl.int32, length: tl.int32,
    stride_b: tl.int64, stride_t: tl.int64, grad_stride_b: tl.int64, grad_stride_t: tl.int64, columns: tl.int32,
    softcap: tl.float32, R: tl.constexpr, E: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Compute one row of the gradient from its column of the state (7, N) and of the slopes (3, N)."""
    row = tl.program_id(0)
    target = tl.load(ids + row)
    x_row = logits + row_offset(row, length, stride_b, stride_t)
    g_row = grad + row_offset(row, length, grad_stride_b, grad_stride_t)
    if target == IGNORED:
        head, pieces = peel(x_row, columns, E)
        zero_row(g_row, head, pieces, columns, R, E)
    else:
        temperature = usable(tl.load(temperatures + row * temperatures_t))
        start = open_row(x_row, x_row, target, columns, temperature, softcap, E, SOFTCAP, False)
        place, _, _, scales = start
        _, scale, inverse_softcap = scales
        state += row
        max2, log2_sum = tl.load(state + 3 * count), tl.load(state + 4 * count)
        state_row = (tl.load(state), tl.load(state + count), 0.0, max2, log2_sum, 0.0, 0.0)
        slopes_row = tl.load(slopes + row), tl.load(slopes + row + count), 0.0
        factor = factors(state_row, slopes_row, tl.exp2(-log2_sum), temperature, True, False)
        sweep_gradient(place, x_row, g_row, factor, max2, max2, scale, softcap, inverse_softcap, R, E, True, SOFTCAP,
                       False)  # fmt: skip
        store_ends(start, g_row, state_row, slopes_row, factor, softcap, True, SOFTCAP, False)


@runtime_jit
def scale(
    grad, upstream, upstream_stride: tl.int64, flags, count: tl.int32, length: tl.int32, grad_stride_b: tl.int64,
    grad_stride_t: tl.int64, columns: tl.int32, given: tl.int32, R: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Multiply rows by their upstream gradient; a row whose factor is 1, or whose flags are 0, is not touched.

    A program takes every row that is a multiple of the number of programs after its first: where nothing has to be
    done, few programs see that.
    """
    for row in range(tl.program_id(0), count, tl.num_programs(0)):
        factor = tl.load(upstream + row * upstream_stride)
        if factor != 1.0:
            alive = tl.load(flags + row, mask=given & FLAGS != 0, other=1)
            if alive != 0:
                g_row = grad + row_offset(row, length, grad_stride_b, grad_stride_t)
                head, pieces = peel(g_row, columns, E)
                scale_row(g_row, head, pieces, columns, factor, R, E)
