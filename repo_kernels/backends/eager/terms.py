"""The mathematics per token: advantage, ratio, clip, KL, and the scalars that carry the gradient.

Each function maps tensors (n,) of live tokens to tensors (n,). The vocabulary does not occur, since three scalars per
token determine the gradient of the logits z, with p = softmax(z), reference q and target y:

    dL/dz_v = g_logp (1[v = y] - p_v) - g_entropy p_v (log p_v + H) + g_kl p_v (log p_v - log q_v - KL)

where g_logp = dL/d log p_y, g_entropy = dL/dH and g_kl = dL/dKL. The kernels multiply by these scalars. PyTorch
differentiates the loss itself, as `losses.composite` lets it, to the same values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import (
    CLIPPED_HIGH,
    CLIPPED_LOW,
    COST_GATED,
    COST_GIVEN,
    COST_HINGE,
    KL_K1,
    KL_K2,
    KL_K3,
    LIVE,
    SCALARS,
    UNSAFE,
    Code,
)

LOG_RATIO_CLAMP = 20.0


@dataclass(frozen=True)
class Coefficients:
    """SCALARS as 0-d tensors of the compute dtype on the logits' device; dual_clip is inf for none."""

    lam: Tensor
    beta: Tensor
    eps_low: Tensor
    eps_high: Tensor
    entropy_coef: Tensor
    temperature: Tensor
    grad_scale: Tensor
    dual_clip: Tensor
    cost_limit: Tensor
    divisor: Tensor
    max_length: Tensor


@dataclass(frozen=True)
class TokenInputs:
    """The inputs of n live tokens, each (n,).

    Args:
        advantages: the combined advantage A_R - lam A_C.
        weights: aggregation weights w_t.
        unsafe: bool, C > d.
        old_logps: log-probabilities under the sampling policy, or None for rho = 1.
        ref_logps: log-probabilities under the reference, or None without a sampled estimator of the KL.
        importance_weights: factors of the surrogate.
    """

    advantages: Tensor
    weights: Tensor
    unsafe: Tensor
    old_logps: Tensor | None
    ref_logps: Tensor | None
    importance_weights: Tensor


@dataclass(frozen=True)
class TokenTerms:
    """The results of n tokens, each (n,): weighted loss, gradient scalars, and what the statistics need."""

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
    """Compute logps - base; 0 where both are the same infinity: a token impossible under both has ratio 1."""
    return torch.where((logps == base) & logps.isinf(), 0.0, logps - base)


def constant_zero(x: Tensor) -> Tensor:
    """Return zeros whose derivative in x is 1."""
    return torch.where(x.isfinite(), x - x.detach(), torch.zeros_like(x))


def clamp_log_ratio(x: Tensor) -> tuple[Tensor, Tensor]:
    """Clamp x to +-20; also return its slope, 1 inside and 0 where the clamp acts."""
    inside = (x.abs() <= LOG_RATIO_CLAMP).to(x.dtype)
    return x.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP), inside


def token_log_ratio(inputs: TokenInputs, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log pi - old_logps, clamped, and its slope in log pi; without old_logps the value is 0."""
    if inputs.old_logps is None:
        return constant_zero(logps), torch.ones_like(logps)
    return clamp_log_ratio(log_difference(logps, inputs.old_logps))


def hinge(costs: Tensor, cost_limit: Tensor) -> Tensor:
    """Compute the rectified cost {C - d}^+."""
    return (costs - cost_limit).clamp_min(0)


def combined_advantages(values: dict[str, Tensor], unsafe: Tensor, lam: Tensor, code: Code) -> Tensor:
    """Compute A_R - lam A_C, divided by 1 + lam with `normalize`.

    A_C is given, gated by 1[C > d], or the hinge {C - d}^+ minus its baseline (RePO, arXiv:2410.19933).
    """
    advantages = values["reward_advantages"]
    if code.cost == COST_HINGE:
        advantages = advantages - lam * (hinge(values["costs"], values["cost_limits"]) - values["cost_baselines"])
    elif code.cost == COST_GATED:
        advantages = advantages - lam * torch.where(unsafe, values["cost_advantages"], 0.0)
    elif code.cost == COST_GIVEN:
        advantages = advantages - lam * values["cost_advantages"]
    return advantages / (1 + lam) if code.normalize else advantages


def token_inputs(values: dict[str, Tensor], coef: Coefficients, code: Code) -> TokenInputs:
    """Combine the values (n,) of live rows, by the names of `dense.VALUES`, into the inputs of `token_terms`."""
    unsafe = values["costs"] > values["cost_limits"]
    return TokenInputs(
        advantages=combined_advantages(values, unsafe, coef.lam, code),
        weights=values["weights"],
        unsafe=unsafe,
        old_logps=None if code.on_policy else values["old_logps"],
        ref_logps=values["ref_logps"] if code.kl in (KL_K1, KL_K2, KL_K3) else None,
        importance_weights=values["importance_weights"],
    )


def coefficients(scalars: Tensor) -> Coefficients:
    """Name the entries of the scalars vector (11,)."""
    return Coefficients(**dict(zip(SCALARS, scalars.unbind(0), strict=True)))


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: Tensor, high: Tensor, dual_clip: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute -min(rho A, clip(rho) A), for A < 0 at most -c A (PPO, arXiv:1707.06347; dual clip, arXiv:1912.09729).

    Also returns 1 where the unclipped branch carries the gradient, as it does at a tie, and 0 elsewhere.
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
    """Estimate KL(pi || pi_ref) from delta = log pi - log pi_ref; also return the derivative in delta.

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
    """Compute (KL without rho, kappa, d kappa / d log pi) for a sampled estimator; the loss adds beta kappa."""
    assert inputs.ref_logps is not None
    delta, inside = clamp_log_ratio(log_difference(logps, inputs.ref_logps))
    kl, slope = kl_estimate(delta, estimator)
    if not kl_importance_weighted or estimator == "k2":
        return kl, kl, slope * inside
    # d(rho KL)/d log pi = rho KL + rho KL'; for k3 the exponentials cancel exactly and rho delta is left. This form is
    # used, with delta clamped, also where the clamp acts: rho KL alone is 1e8 there and points away from the reference.
    derivative, kappa = ratio * (kl * ratio_inside + slope * inside), ratio * kl
    if estimator == "k3":
        derivative = torch.where(ratio_inside > 0, ratio * delta, ratio * slope * inside)
        # what has that derivative: d(rho (delta - 1))/d log pi = rho delta, and rho delta where delta is clamped
        primitive = torch.where(ratio_inside > 0, ratio * (delta - inside), kappa)
        kappa = kappa.detach() + constant_zero(primitive)
    return kl, kappa, derivative


def token_terms(
    inputs: TokenInputs,
    logps: Tensor,
    entropy: Tensor | None,
    full_kl: Tensor | None,
    coef: Coefficients,
    kl_estimator: str,
    kl_importance_weighted: bool,
) -> TokenTerms:
    """Compute w (v surrogate + beta kappa - entropy_coef H) and its derivatives in log pi(y), H and the full KL.

    Args:
        inputs: w is `weights`, v is `importance_weights`.
        logps: log-probabilities of the tokens under the current policy.
        entropy: H of the current policy, or None if the loss does not use it.
        full_kl: KL over the vocabulary, or None for a sampled estimator or none.
        coef: the scalars.
        kl_estimator: "k1", "k2" or "k3" for a sampled estimator.
        kl_importance_weighted: multiply k1 and k3 by rho.
    """
    log_ratio, inside = token_log_ratio(inputs, logps)
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


def token_rows(terms: TokenTerms, logps: Tensor, entropy: Tensor | None) -> Tensor:
    """Stack the columns (5, n) of ROWS of live rows."""
    return torch.stack(
        (terms.loss, logps, torch.zeros_like(logps) if entropy is None else entropy, terms.kl, terms.log_ratio)
    )


def token_flags(terms: TokenTerms, unsafe: Tensor) -> Tensor:
    """Combine the bits of live rows, (n,) int32."""
    bits = LIVE + unsafe * UNSAFE + terms.clipped_low * CLIPPED_LOW + terms.clipped_high * CLIPPED_HIGH
    return bits.to(torch.int32)
