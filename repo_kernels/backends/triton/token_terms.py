"""The token terms of one row: advantage, ratio, clip, KL and the scalars of the gradient, as in eager/terms.py.

Options are bits of `code` (interface.py), read once per row. Comparisons let NaN through, and fp32 arithmetic is not
contracted, so that rho = 1 +- eps and C = d fall on the same side as in eager/terms.py.
"""

import triton
import triton.language as tl

from .. import interface
from .scalar_math import exp, expm1

COST_NONE = tl.constexpr(interface.COST_NONE)
COST_GATED = tl.constexpr(interface.COST_GATED)
COST_HINGE = tl.constexpr(interface.COST_HINGE)
KL_NONE = tl.constexpr(interface.KL_NONE)
KL_K1 = tl.constexpr(interface.KL_K1)
KL_K2 = tl.constexpr(interface.KL_K2)
KL_K3 = tl.constexpr(interface.KL_K3)
KL_FULL = tl.constexpr(interface.KL_FULL)
ENTROPY_NONE = tl.constexpr(interface.ENTROPY_NONE)
ENTROPY_GRADIENT = tl.constexpr(interface.ENTROPY_GRADIENT)
LOG_RATIO_CLAMP = tl.constexpr(20.0)

REWARD_ADVANTAGES = tl.constexpr(interface.VALUES.index("reward_advantages"))
COST_ADVANTAGES = tl.constexpr(interface.VALUES.index("cost_advantages"))
COSTS = tl.constexpr(interface.VALUES.index("costs"))
COST_LIMITS = tl.constexpr(interface.VALUES.index("cost_limits"))
COST_BASELINES = tl.constexpr(interface.VALUES.index("cost_baselines"))
OLD_LOGPS = tl.constexpr(interface.VALUES.index("old_logps"))
REF_LOGPS = tl.constexpr(interface.VALUES.index("ref_logps"))
IMPORTANCE_WEIGHTS = tl.constexpr(interface.VALUES.index("importance_weights"))
WEIGHTS = tl.constexpr(interface.VALUES.index("weights"))

LAM = tl.constexpr(interface.SCALARS.index("lam"))
BETA = tl.constexpr(interface.SCALARS.index("beta"))
EPS_LOW = tl.constexpr(interface.SCALARS.index("eps_low"))
EPS_HIGH = tl.constexpr(interface.SCALARS.index("eps_high"))
ENTROPY_COEF = tl.constexpr(interface.SCALARS.index("entropy_coef"))
TEMPERATURE = tl.constexpr(interface.SCALARS.index("temperature"))
GRAD_SCALE = tl.constexpr(interface.SCALARS.index("grad_scale"))
DUAL_CLIP = tl.constexpr(interface.SCALARS.index("dual_clip"))

TOKENS = tl.constexpr(len(interface.TOKENS))


@triton.jit
def row_inputs(values, scalars, row, count, code):
    """Load (advantage, unsafe, old_logp, ref_logp, importance_weight, weight) of one row of the values (9, N).

    The advantage is A_R - lam A_C, divided by 1 + lam if normalized. A_C is 0, given, given where C > d, or the hinge
    {C - d}^+ - baseline.
    """
    values += row
    cost, kl, on_policy = code & 3, (code >> 2) & 7, (code >> 7) & 1
    sampled = (kl == KL_K1) | (kl == KL_K2) | (kl == KL_K3)
    given = (cost != COST_NONE) & (cost != COST_HINGE)
    reward_advantage = tl.load(values + REWARD_ADVANTAGES * count)
    cost_advantage = tl.load(values + COST_ADVANTAGES * count, mask=given, other=0.0)
    cost_value = tl.load(values + COSTS * count)
    limit = tl.load(values + COST_LIMITS * count)
    baseline = tl.load(values + COST_BASELINES * count)
    old_logp = tl.load(values + OLD_LOGPS * count, mask=on_policy == 0, other=0.0)
    ref_logp = tl.load(values + REF_LOGPS * count, mask=sampled, other=0.0)
    importance_weight = tl.load(values + IMPORTANCE_WEIGHTS * count)
    weight = tl.load(values + WEIGHTS * count)
    lam = tl.load(scalars + LAM)
    unsafe = cost_value > limit
    cost_advantage = tl.where((cost != COST_GATED) | unsafe, cost_advantage, 0.0)
    excess = cost_value - limit
    cost_advantage = tl.where(cost == COST_HINGE, tl.where(excess < 0, 0.0, excess) - baseline, cost_advantage)
    advantage = tl.where(cost == COST_NONE, reward_advantage, reward_advantage - lam * cost_advantage)
    advantage = tl.where((code >> 6) & 1 != 0, advantage / (1 + lam), advantage)
    return advantage, unsafe, old_logp, ref_logp, importance_weight, weight


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
def token_terms(inputs, logp, entropy, full_kl, scalars, code, entropy_mode, losses, tokens, row, count):
    """Store the row's loss and its 13 token values; return (g_logp, g_entropy, g_kl) times grad_scale."""
    advantage, unsafe, old_logp, ref_logp, importance_weight, weight = inputs
    beta = tl.load(scalars + BETA)
    low, high = 1 - tl.load(scalars + EPS_LOW), 1 + tl.load(scalars + EPS_HIGH)
    entropy_coef = tl.load(scalars + ENTROPY_COEF)
    grad_scale = tl.load(scalars + GRAD_SCALE)
    kl_code, on_policy = (code >> 2) & 7, (code >> 7) & 1

    log_ratio, inside = clamped_log_ratio(logp, tl.where(on_policy != 0, logp, old_logp))
    inside = tl.where(on_policy != 0, 1.0, inside)
    ratio = exp(log_ratio)
    surrogate, active = clipped_surrogate(ratio, advantage, low, high, tl.load(scalars + DUAL_CLIP))
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

    clipped_low = tl.where((ratio < low) & (advantage < 0), 1.0, 0.0)
    clipped_high = tl.where((ratio > high) & (advantage > 0), 1.0, 0.0)
    unsafe_one = tl.where(unsafe, 1.0, 0.0)
    tl.store(losses + row, weight * loss)
    tokens += row
    tl.store(tokens, logp)
    tl.store(tokens + count, entropy)
    tl.store(tokens + 2 * count, kl)
    tl.store(tokens + 3 * count, 1.0)
    tl.store(tokens + 4 * count, unsafe_one)
    tl.store(tokens + 5 * count, clipped_low * (1 - unsafe_one))
    tl.store(tokens + 6 * count, clipped_low * unsafe_one)
    tl.store(tokens + 7 * count, clipped_high * (1 - unsafe_one))
    tl.store(tokens + 8 * count, clipped_high * unsafe_one)
    tl.store(tokens + 9 * count, ratio)
    tl.store(tokens + 10 * count, ratio * ratio)
    tl.store(tokens + 11 * count, -log_ratio)
    tl.store(tokens + 12 * count, expm1(log_ratio) - log_ratio)
    return g_logp * grad_scale, g_entropy * grad_scale, g_kl * grad_scale
