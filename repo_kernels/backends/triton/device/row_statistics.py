"""Statistics of one row: streaming maximum, sum, entropy and full KL, per lane until the lanes are merged once.

With c = log2(e) / temperature and a lane's scaled maximum m2 = fl(c max z), t_v = fma(z_v, c, -m2) and e_v = 2^t_v:
  total    sum e_v
  weighted sum e_v t_v
  cross    sum e_v (t_v - t'_v), where t' is the reference's
When m2 grows by -d, total *= 2^d, weighted = 2^d (weighted + d total), cross = 2^d (cross + (d - d') total).
The maximum is kept scaled, so that t and the log-sum are accurate to fp32 whatever offset the logits have in common.
"""
# ruff: noqa: N803 (compile-time values are upper case)
# mypy: disallow-incomplete-defs=False

import triton
import triton.language as tl

from .scalar_math import LN2, LOG2E, log1p, log2, softcap_logits

LARGEST = tl.constexpr(2.0**31)  # a larger scaled maximum leaves no digits for differences and gives NaN
FLOOR = tl.constexpr(-1e30)  # a finite minus infinity: differences and products with 0 stay numbers


@triton.jit
def prepare(x, live, softcap, inverse_softcap, SOFTCAP: tl.constexpr, FINITE: tl.constexpr):
    """Return (logits in fp32 after the softcap, slope of the softcap).

    Logits are -inf where not live (`live` None: all are), and finite with FINITE, for sums in which t_v is a factor.
    """
    z = x.to(tl.float32)
    slope = z
    if SOFTCAP:
        z, slope = softcap_logits(z, softcap, inverse_softcap)
        if live is not None:
            z = tl.where(live, z, float("-inf"))
    if FINITE:
        z = tl.maximum(z, FLOOR)
    return z, slope


@triton.jit
def empty_lanes(scale, R: tl.constexpr):
    """Return lanes without an element: (max2, total, weighted, ref_max2, ref_total, cross), (R,) each.

    Their maximum is scaled like the logits and lies above that of a logit at FLOOR, so that such a logit adds nothing.
    """
    floor, zero = tl.full([R], FLOOR, tl.float32) * (scale / 4), tl.zeros([R], tl.float32)
    return floor, zero, zero, floor, zero, zero


@triton.jit
def accumulate(lanes, z, ref_z, scale, ENTROPY: tl.constexpr, FULL_KL: tl.constexpr):
    """Accumulate a block (R, E) into the lanes (R,)."""
    max2, total, weighted, ref_max2, ref_total, cross = lanes
    grown = tl.maximum(max2, tl.max(z, axis=1) * scale)
    shift = max2 - grown
    shrink = tl.exp2(shift)
    t = tl.fma(z, scale, -grown[:, None])
    e = tl.exp2(t)
    if ENTROPY:
        weighted = tl.fma(shrink, tl.fma(shift, total, weighted), tl.sum(e * t, axis=1))
    if FULL_KL:
        ref_grown = tl.maximum(ref_max2, tl.max(ref_z, axis=1) * scale)
        ref_shift = ref_max2 - ref_grown
        ref_t = tl.fma(ref_z, scale, -ref_grown[:, None])
        cross = tl.fma(shrink, tl.fma(shift - ref_shift, total, cross), tl.sum(e * (t - ref_t), axis=1))
        ref_total = tl.fma(ref_total, tl.exp2(ref_shift), tl.sum(tl.exp2(ref_t), axis=1))
        ref_max2 = ref_grown
    total = tl.fma(total, shrink, tl.sum(e, axis=1))
    return grown, total, weighted, ref_max2, ref_total, cross


@triton.jit
def log_sum(rest, t):
    """Compute (log2(rest + 2^t), ln(2^t / (rest + 2^t))), where 2^t is the target's term.

    If the target has most of the sum, the logarithm goes through log1p(rest / 2^t), so that 1 - p_y keeps its digits.
    """
    e = tl.exp2(t)
    if rest < e:
        tail = log1p(rest / e)
        log2_sum = tl.fma(tail, LOG2E, t)
        logp = -tail
    else:
        log2_sum = log2(rest + e)
        logp = (t - log2_sum) * LN2
        logp = tl.where(logp > 0, 0.0, logp)
    return log2_sum, logp


@triton.jit
def meet(lanes, edges, ref_edges, z, ref_z, scale, ENTROPY: tl.constexpr, FULL_KL: tl.constexpr):
    """Merge lanes (R,), edges (EDGES,) and target into the row's STATE and its sum s.

    H = ln2 (log2 s - sum e t / s);  KL = ln2 (cross / s - log2(s / s')), where s and s' are sums at the row's maxima.
    """
    max2, total, weighted, ref_max2, ref_total, cross = lanes
    top = tl.maximum(tl.maximum(tl.max(max2, axis=0), tl.max(edges, axis=0) * scale), z * scale)
    top = tl.where(tl.abs(top) < LARGEST, top, float("nan"))
    shift = max2 - top
    shrink = tl.exp2(shift)
    edge_t, t = tl.fma(edges, scale, -top), tl.fma(z, scale, -top)
    edge_e, e = tl.exp2(edge_t), tl.exp2(t)
    rest = tl.sum(total * shrink, axis=0) + tl.sum(edge_e, axis=0)
    t_finite = tl.maximum(t, FLOOR)
    log2_sum, logp = log_sum(rest, t)
    total_row = rest + e
    entropy, kl, ref_top, ref_log2_sum = 0.0, 0.0, 0.0, 0.0
    if ENTROPY:
        weighted_row = tl.sum(shrink * tl.fma(shift, total, weighted), axis=0) + tl.sum(edge_e * edge_t, axis=0)
        entropy = LN2 * (log2_sum - tl.fma(e, t_finite, weighted_row) / total_row)
    if FULL_KL:
        ref_top = tl.maximum(tl.max(ref_max2, axis=0), tl.max(ref_edges, axis=0) * scale)
        ref_top = tl.maximum(ref_top, ref_z * scale)
        ref_shift = ref_max2 - ref_top
        ref_edge_t, ref_t = tl.fma(ref_edges, scale, -ref_top), tl.fma(ref_z, scale, -ref_top)
        ref_rest = tl.sum(ref_total * tl.exp2(ref_shift), axis=0) + tl.sum(tl.exp2(ref_edge_t), axis=0)
        ref_log2_sum, _ = log_sum(ref_rest, ref_t)
        cross_row = tl.sum(shrink * tl.fma(shift - ref_shift, total, cross), axis=0)
        cross_row += tl.sum(edge_e * (edge_t - ref_edge_t), axis=0)
        cross_row = tl.fma(e, t_finite - tl.maximum(ref_t, FLOOR), cross_row)
        kl = LN2 * (cross_row / total_row - log2(total_row / (ref_rest + tl.exp2(ref_t))))
    return logp, entropy, kl, top, log2_sum, ref_top, ref_log2_sum, total_row
