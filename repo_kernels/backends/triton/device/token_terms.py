"""The token terms of one row: advantage, ratio, clip, KL and the scalars of the gradient, as in eager/terms.py.

Options are bits of `code` (codes.py), read once per row. Comparisons let NaN through, and fp32 arithmetic is not
contracted, so that rho = 1 +- eps and C = d fall on the same side as in eager/terms.py.
"""

import triton
import triton.language as tl

from ... import codes
from .loss_arguments import (
    BASELINES,
    BETA,
    COST_LIMIT,
    COST_LIMITS,
    COSTS,
    DUAL_CLIP,
    ENTROPY_COEF,
    EPS_HIGH,
    EPS_LOW,
    GRAD_SCALE,
    IMPORTANCE,
    LAM,
    SEQ_TOKEN_MEAN,
    TOTAL,
    at,
    hinge,
)
from .scalar_math import exp, expm1

COST_NONE = tl.constexpr(codes.COST_NONE)
COST_GATED = tl.constexpr(codes.COST_GATED)
COST_HINGE = tl.constexpr(codes.COST_HINGE)
KL_K1 = tl.constexpr(codes.KL_K1)
KL_K2 = tl.constexpr(codes.KL_K2)
KL_K3 = tl.constexpr(codes.KL_K3)
KL_FULL = tl.constexpr(codes.KL_FULL)
ENTROPY_NONE = tl.constexpr(codes.ENTROPY_NONE)
ENTROPY_GRADIENT = tl.constexpr(codes.ENTROPY_GRADIENT)
LOG_RATIO_CLAMP = tl.constexpr(20.0)
LIVE, UNSAFE, CLIPPED_LOW, CLIPPED_HIGH = (
    tl.constexpr(bit) for bit in (codes.LIVE, codes.UNSAFE, codes.CLIPPED_LOW, codes.CLIPPED_HIGH)
)


@triton.jit
def cost_inputs(costs, limits, baselines, shared, sequence, token, given):
    """Load (whether C > d, {C - d}^+ minus the baseline) of one row; (False, -baseline) without costs."""
    cost = tl.load(at(costs, sequence, token), mask=given & COSTS != 0, other=float("-inf"))
    limit = tl.load(shared + COST_LIMIT)
    if given & COST_LIMITS != 0:
        limit = tl.load(at(limits, sequence, token))
    baseline = tl.load(at(baselines, sequence, token), mask=given & BASELINES != 0, other=0.0)
    return cost > limit, hinge(cost, limit) - baseline


@triton.jit
def row_inputs(rewards, cost_advantages, costs, limits, baselines, old_logps, ref_logps, shared, sequence, token,
               code, given):  # fmt: skip
    """Load (advantage, unsafe, old_logp, ref_logp) of one row.

    The advantage is A_R - lam A_C, divided by 1 + lam if normalized. A_C is 0, given, given where C > d, or the hinge
    {C - d}^+ - baseline.
    """
    cost, kl, on_policy = code & 3, (code >> 2) & 7, (code >> 7) & 1
    sampled = (kl == KL_K1) | (kl == KL_K2) | (kl == KL_K3)
    reward_advantage = tl.load(at(rewards, sequence, token))
    unsafe, excess = cost_inputs(costs, limits, baselines, shared, sequence, token, given)
    cost_advantage = tl.load(
        at(cost_advantages, sequence, token), mask=(cost != COST_NONE) & (cost != COST_HINGE), other=0.0
    )
    cost_advantage = tl.where((cost != COST_GATED) | unsafe, cost_advantage, 0.0)
    cost_advantage = tl.where(cost == COST_HINGE, excess, cost_advantage)
    lam = tl.load(shared + LAM)
    advantage = tl.where(cost == COST_NONE, reward_advantage, reward_advantage - lam * cost_advantage)
    advantage = tl.where((code >> 6) & 1 != 0, advantage / (1 + lam), advantage)
    old_logp = tl.load(at(old_logps, sequence, token), mask=on_policy == 0, other=0.0)
    ref_logp = tl.load(at(ref_logps, sequence, token), mask=sampled, other=0.0)
    return advantage, unsafe, old_logp, ref_logp


@triton.jit
def row_weights(importance_weights, shared, counts, sequence, token, code, given):
    """Load (importance weight, weight of the aggregation) of one row."""
    importance_weight = tl.load(at(importance_weights, sequence, token), mask=given & IMPORTANCE != 0, other=1.0)
    total = tl.load(shared + TOTAL)
    total *= tl.load(counts + sequence, mask=(code >> 8) & 7 == SEQ_TOKEN_MEAN, other=1.0)
    return importance_weight, tl.div_rn(1.0, total)


@triton.jit
def clamped_log_ratio(logp, base):
    """Compute (logp - base clamped to +-20, 1 where its gradient passes, else 0); 0 for two equal infinities."""
    x = tl.where(logp == base, 0.0, logp - base)
    low, high = x < -LOG_RATIO_CLAMP, x > LOG_RATIO_CLAMP
    inside = tl.where(low | high, 0.0, 1.0)
    return tl.where(low, -LOG_RATIO_CLAMP, tl.where(high, LOG_RATIO_CLAMP, x)), inside


@triton.jit
def clipped_surrogate(ratio, advantage, low, high, dual_clip):
    """Compute (-min(rho A, clip(rho) A), for A < 0 at most -c A; 1 if the unclipped branch carries the gradient)."""
    unclipped = ratio * advantage
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    active = unclipped <= clipped
    objective = tl.where(active, unclipped, clipped)
    floor = dual_clip * advantage
    bound = (advantage < 0) & (floor > objective)
    return -tl.where(bound, floor, objective), tl.where(active & (bound == 0), 1.0, 0.0)


@triton.jit
def kl_terms(logp, ref_logp, ratio, ratio_inside, kl_code, kl_importance_weighted):
    """Compute (KL without rho, kappa, d kappa / d log pi) of a sampled estimator, zeros without one.

    The loss adds beta kappa. With rho, d(rho KL)/d log pi = rho (KL + KL'); for k3 the exponentials cancel and rho
    delta is left.
    """
    delta, inside = clamped_log_ratio(logp, ref_logp)
    change = expm1(-delta)
    k1, k2 = kl_code == KL_K1, kl_code == KL_K2
    kl = tl.where(k1, delta, tl.where(k2, 0.5 * delta * delta, change + delta))
    slope = tl.where(k1, 1.0, tl.where(k2, delta, -change)) * inside
    weighted_slope = ratio * (kl * ratio_inside + slope)
    k3_slope = tl.where(ratio_inside > 0, ratio * delta, ratio * slope)
    weighted_slope = tl.where(kl_code == KL_K3, k3_slope, weighted_slope)
    with_ratio = (kl_importance_weighted != 0) & (kl_code != KL_K2)
    kappa = tl.where(with_ratio, ratio * kl, kl)
    derivative = tl.where(with_ratio, weighted_slope, slope)
    sampled = k1 | k2 | (kl_code == KL_K3)
    return tl.where(sampled, kl, 0.0), tl.where(sampled, kappa, 0.0), tl.where(sampled, derivative, 0.0)


@triton.jit
def token_terms(inputs, weights, logp, entropy, full_kl, shared, code, entropy_mode, rows, flags, row, count):
    """Store the row's column of ROWS and its flags; return (g_logp, g_entropy, g_kl) times grad_scale."""
    advantage, unsafe, old_logp, ref_logp = inputs
    importance_weight, weight = weights
    beta = tl.load(shared + BETA)
    low, high = 1 - tl.load(shared + EPS_LOW), 1 + tl.load(shared + EPS_HIGH)
    entropy_coef = tl.load(shared + ENTROPY_COEF)
    grad_scale = tl.load(shared + GRAD_SCALE)
    kl_code, on_policy = (code >> 2) & 7, (code >> 7) & 1

    log_ratio, inside = clamped_log_ratio(logp, tl.where(on_policy != 0, logp, old_logp))
    inside = tl.where(on_policy != 0, 1.0, inside)
    ratio = exp(log_ratio)
    surrogate, active = clipped_surrogate(ratio, advantage, low, high, tl.load(shared + DUAL_CLIP))
    # d(-rho A)/d log pi = -rho A on the branch that is the minimum
    g_logp = importance_weight * (-ratio * advantage * active * inside)

    kl, kappa, derivative = kl_terms(logp, ref_logp, ratio, inside, kl_code, (code >> 5) & 1)
    full = kl_code == KL_FULL
    kl, kappa = tl.where(full, full_kl, kl), tl.where(full, full_kl, kappa)
    entropy = tl.where(entropy_mode != ENTROPY_NONE, entropy, 0.0)
    loss = importance_weight * surrogate + beta * kappa - entropy_coef * entropy
    g_logp = (g_logp + beta * derivative) * weight
    g_entropy = tl.where(entropy_mode == ENTROPY_GRADIENT, -weight * entropy_coef, 0.0)
    g_kl = tl.where(full, weight * beta, 0.0)

    clipped_low = (ratio < low) & (advantage < 0)
    clipped_high = (ratio > high) & (advantage > 0)
    bits = LIVE + tl.where(unsafe, UNSAFE, 0) + tl.where(clipped_low, CLIPPED_LOW, 0)
    tl.store(flags + row, bits + tl.where(clipped_high, CLIPPED_HIGH, 0))
    store_row(rows, row, count, weight * loss, logp, entropy, kl, log_ratio)
    return g_logp * grad_scale, g_entropy * grad_scale, g_kl * grad_scale


@triton.jit
def store_row(rows, row, count, loss, logp, entropy, kl, log_ratio):
    """Store one column of ROWS."""
    rows += row
    tl.store(rows, loss)
    tl.store(rows + count, logp)
    tl.store(rows + 2 * count, entropy)
    tl.store(rows + 3 * count, kl)
    tl.store(rows + 4 * count, log_ratio)
