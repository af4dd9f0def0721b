"""The per-token mathematics of the RePO loss: advantage, ratio, clip, KL and the scalars that carry the gradient.

Every function maps (n,) tensors of live tokens to (n,) tensors. Nothing here knows about the vocabulary: the gradient
with respect to the logits follows from three scalars per token (README, "What is computed"),

    dL/dz_v = g_logp (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_kl p_v (log p_v - log q_v - KL).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..interface import COST_GATED, COST_GIVEN, COST_HINGE, KL_K1, KL_K2, KL_K3, SCALARS, TOKENS, VALUES, Code

LOG_RATIO_CLAMP = 20.0


@dataclass(frozen=True)
class Coefficients:
    """Scalars of the loss as 0-d tensors of the compute type on the logits' device; dual_clip inf never binds."""

    lam: Tensor
    beta: Tensor
    eps_low: Tensor
    eps_high: Tensor
    entropy_coef: Tensor
    temperature: Tensor
    grad_scale: Tensor
    dual_clip: Tensor


@dataclass(frozen=True)
class TokenInputs:
    """What the terms read for each of n live tokens; optional members are None when the loss does not use them.

    advantages: combined advantage A_R - lambda A_C; weights: aggregation weight w_t; unsafe: 1[C > d], bool.
    """

    advantages: Tensor
    weights: Tensor
    unsafe: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    importance_weights: Tensor


@dataclass(frozen=True)
class TokenTerms:
    """Per-token results, each (n,): weighted loss, gradient scalars, and what the statistics need."""

    loss: Tensor
    g_logp: Tensor
    g_entropy: Tensor
    g_kl: Tensor
    ratio: Tensor
    log_ratio: Tensor
    kl: Tensor
    clipped_low: Tensor
    clipped_high: Tensor


def log_difference(logps: Tensor, base: Tensor) -> Tensor:
    """logps - base, and 0 where both are the same infinity (a token impossible under both has ratio 1)."""
    return torch.where(logps == base, torch.zeros_like(logps), logps - base)


def clamp_log_ratio(x: Tensor) -> tuple[Tensor, Tensor]:
    """x clamped to +-20, and 1 where its gradient passes, 0 where the clamp acts."""
    inside = (x.abs() <= LOG_RATIO_CLAMP).to(x.dtype)
    return x.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP), inside


def hinge(costs: Tensor, cost_limit: Tensor) -> Tensor:
    """The rectifier {C - d}^+."""
    return (costs - cost_limit).clamp_min(0)


def combined_advantages(values: dict[str, Tensor], unsafe: Tensor, lam: Tensor, code: Code) -> Tensor:
    """A_R - lambda A_C; A_C is given, gated by 1[C > d], or the hinge less its baseline. Source: README.

    Divided by 1 + lambda with `normalize`.
    """
    advantages = values["reward_advantages"]
    if code.cost == COST_HINGE:
        advantages = advantages - lam * (hinge(values["costs"], values["cost_limits"]) - values["cost_baselines"])
    elif code.cost == COST_GATED:
        advantages = advantages - lam * torch.where(unsafe, values["cost_advantages"], 0.0)
    elif code.cost == COST_GIVEN:
        advantages = advantages - lam * values["cost_advantages"]
    return advantages / (1 + lam) if code.normalize else advantages


def token_inputs(values: Tensor, scalars: Tensor, code: Code) -> TokenInputs:
    """The inputs of live rows from their columns (9, n) of the values matrix."""
    by_name = dict(zip(VALUES, values.unbind(0), strict=True))
    unsafe = by_name["costs"] > by_name["cost_limits"]
    return TokenInputs(
        advantages=combined_advantages(by_name, unsafe, coefficients(scalars).lam, code),
        weights=by_name["weights"],
        unsafe=unsafe,
        old_logps=None if code.on_policy else by_name["old_logps"],
        ref_logps=by_name["ref_logps"] if code.kl in (KL_K1, KL_K2, KL_K3) else None,
        importance_weights=by_name["importance_weights"],
    )


def coefficients(scalars: Tensor) -> Coefficients:
    """The (8,) vector by name."""
    return Coefficients(**dict(zip(SCALARS, scalars.unbind(0), strict=True)))


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor, dual_clip: Tensor
) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho) A), for A < 0 bounded by -c A; and 1 where the unclipped branch carries the gradient.

    At a tie the unclipped branch carries it.
    """
    unclipped = ratio * advantages
    clipped = ratio.clamp(low, high) * advantages
    objective = torch.minimum(unclipped, clipped)
    active = unclipped <= clipped
    floor = dual_clip * advantages
    bound = (advantages < 0) & (floor > objective)
    objective = torch.where(bound, floor, objective)
    active = active & ~bound
    return -objective, active.to(ratio.dtype)


def kl_estimate(delta: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """Sample estimate of KL(pi || pi_ref) from delta = log pi - log pi_ref, and its derivative in delta.

    k1: delta, 1.  k2: delta^2 / 2, delta.  k3: exp(-delta) + delta - 1, 1 - exp(-delta).
    """
    if estimator == "k1":
        return delta, torch.ones_like(delta)
    if estimator == "k2":
        return 0.5 * delta * delta, delta
    expm1 = torch.expm1(-delta)
    return expm1 + delta, -expm1


def kl_terms(
    inputs: TokenInputs,
    logps: Tensor,
    ratio: Tensor,
    ratio_inside: Tensor,
    estimator: str,
    kl_importance_weighted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(KL without rho, kappa = what the loss adds, d kappa / d log pi) for a sampled estimator."""
    assert inputs.ref_logps is not None
    delta, inside = clamp_log_ratio(log_difference(logps, inputs.ref_logps))
    kl, slope = kl_estimate(delta, estimator)
    if not kl_importance_weighted or estimator == "k2":
        return kl, kl, slope * inside
    # d(rho KL)/d log pi = rho KL + rho KL'; for k3 the exponentials cancel exactly and rho delta is left. It is kept,
    # with delta clamped, where delta's clamp acts: there rho KL alone is 1e8 and points away from the reference.
    derivative = ratio * (kl * ratio_inside + slope * inside)
    if estimator == "k3":
        derivative = torch.where(ratio_inside > 0, ratio * delta, ratio * slope * inside)
    return kl, ratio * kl, derivative


def token_terms(
    inputs: TokenInputs,
    logps: Tensor,
    entropy: Tensor | None,
    full_kl: Tensor | None,
    coef: Coefficients,
    kl_estimator: str,
    kl_importance_weighted: bool,
) -> TokenTerms:
    """w (is surrogate + beta kappa - alpha H) per token and its derivatives in log pi(y), H and the full KL.

    logps, entropy, full_kl: (n,) of the current policy. Source: README, "What is computed".
    """
    if inputs.old_logps is None:
        log_ratio, inside = torch.zeros_like(logps), torch.ones_like(logps)
    else:
        log_ratio, inside = clamp_log_ratio(log_difference(logps, inputs.old_logps))
    ratio = log_ratio.exp()
    low, high = 1 - coef.eps_low, 1 + coef.eps_high
    surrogate, active = clipped_surrogate(ratio, inputs.advantages, low, high, coef.dual_clip)
    # d(-rho A)/d log pi = -rho A on the branch that is the minimum
    g_logp = -ratio * inputs.advantages * active * inside
    surrogate, g_logp = inputs.importance_weights * surrogate, inputs.importance_weights * g_logp

    kl = g_kl = torch.zeros_like(logps)
    loss = surrogate
    if full_kl is not None:
        kl = full_kl
        loss = loss + coef.beta * kl
        g_kl = inputs.weights * coef.beta
    elif inputs.ref_logps is not None:
        kl, kappa, derivative = kl_terms(inputs, logps, ratio, inside, kl_estimator, kl_importance_weighted)
        loss = loss + coef.beta * kappa
        g_logp = g_logp + coef.beta * derivative
    g_entropy = torch.zeros_like(logps)
    if entropy is not None:
        loss = loss - coef.entropy_coef * entropy
        g_entropy = g_entropy - inputs.weights * coef.entropy_coef
    return TokenTerms(
        loss=inputs.weights * loss,
        g_logp=inputs.weights * g_logp,
        g_entropy=g_entropy,
        g_kl=g_kl,
        ratio=ratio,
        log_ratio=log_ratio,
        kl=kl,
        clipped_low=(ratio < low) & (inputs.advantages < 0),
        clipped_high=(ratio > high) & (inputs.advantages > 0),
    )


def token_rows(terms: TokenTerms, unsafe: Tensor, logps: Tensor, entropy: Tensor | None) -> Tensor:
    """The (13, n) columns of rows.TOKENS of live tokens."""
    zero, one = torch.zeros_like(logps), torch.ones_like(logps)

    def split(clipped: Tensor, among: Tensor) -> Tensor:
        return (clipped & among).to(logps.dtype)

    by_name = {
        "logp": logps,
        "entropy": zero if entropy is None else entropy,
        "kl": terms.kl,
        "tokens": one,
        "tokens_unsafe": unsafe.to(logps.dtype),
        "clipped_low_safe": split(terms.clipped_low, ~unsafe),
        "clipped_low_unsafe": split(terms.clipped_low, unsafe),
        "clipped_high_safe": split(terms.clipped_high, ~unsafe),
        "clipped_high_unsafe": split(terms.clipped_high, unsafe),
        "ratio": terms.ratio,
        "ratio_square": terms.ratio * terms.ratio,
        "kl_old_k1": -terms.log_ratio,
        "kl_old_k3": torch.expm1(terms.log_ratio) - terms.log_ratio,
    }
    return torch.stack([by_name[name] for name in TOKENS])
