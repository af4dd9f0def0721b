"""The losses written out in float64 with autograd, one token at a time: what the kernels are compared with.

Written from the specification alone. Nothing is shared with repo_kernels and nothing is fast: each live row is a
log_softmax, each sequence a Python list of rows, each rule an `if`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0


@dataclass
class OracleOutput:
    """loss: 0-d, or leading shape for "none". logps, entropy, kl: leading shape, float64, 0 on dead rows.

    scale: sum of |w_t| times the sizes of the terms of l_t, what an error of the loss is measured against.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    kl: Tensor | None
    stats: dict[str, float]
    scale: float


def sequences_of(leading: tuple[int, ...], cu_seqlens: Tensor | None) -> list[list[int]]:
    """Flat rows of each sequence, empty ones included."""
    if len(leading) == 2:
        return [list(range(b * leading[1], (b + 1) * leading[1])) for b in range(leading[0])]
    if cu_seqlens is None:
        return [[row] for row in range(leading[0])]
    bounds = cu_seqlens.tolist()
    return [list(range(low, high)) for low, high in itertools.pairwise(bounds)]


def log_probs(row: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """(V,) logits -> (V,) log-probabilities of softcap(logits) / temperature."""
    if softcap is not None:
        row = softcap * torch.tanh(row / softcap)
    return torch.log_softmax(row / temperature, -1)


def entropy_of(logp: Tensor) -> Tensor:
    """-sum p log p, impossible entries left out."""
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum()


def full_kl_of(logp: Tensor, logq: Tensor) -> Tensor:
    """sum p (log p - log q), entries impossible under p left out."""
    possible = logp != -math.inf
    return (logp.exp()[possible] * (logp[possible] - logq[possible])).sum()


def clamped_difference(logp: Tensor, base: Tensor) -> Tensor:
    """clamp(logp - base, +-20); the difference of two equal infinities is 0."""
    if logp.detach() == base:
        return (logp - base) if torch.isfinite(base) else torch.zeros_like(logp)
    difference = logp - base
    if abs(difference.item()) > LOG_RATIO_LIMIT:
        return torch.tensor(math.copysign(LOG_RATIO_LIMIT, difference.item()), dtype=torch.float64)
    return difference


def surrogate_of(ratio: Tensor, advantage: float, low: float, high: float, dual_clip: float | None) -> Tensor:
    """-min(rho A, clip(rho) A), at least -c A for A < 0; the unclipped branch has the gradient at a tie."""
    value = ratio.item()
    clipped = min(max(value, low), high) * advantage
    objective = ratio * advantage
    if objective.item() > clipped:
        objective = torch.tensor(clipped, dtype=torch.float64)
    if dual_clip is not None and advantage < 0 and dual_clip * advantage > objective.item():
        objective = torch.tensor(dual_clip * advantage, dtype=torch.float64)
    return -objective


def kl_of(delta: Tensor, estimator: str) -> Tensor:
    """k1, k2 or k3 of delta = log pi - log pi_ref."""
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return delta**2 / 2
    return torch.exp(-delta) + delta - 1


def row_weights(
    mode: str, sequences: list[list[int]], live: set[int], divisor: float | None, max_length: float | None
) -> dict[int, float]:
    """Weight of each live row."""
    with_tokens = [[row for row in rows if row in live] for rows in sequences]
    with_tokens = [rows for rows in with_tokens if rows]
    outer = max(1, len(live) if mode == "token-mean" else len(with_tokens))
    outer = outer if divisor is None else divisor
    weights = {}
    for rows in with_tokens:
        for row in rows:
            if mode in ("token-sum", "none"):
                weights[row] = 1.0
            elif mode in ("token-mean", "seq-mean-token-sum"):
                weights[row] = 1.0 / outer
            elif mode == "seq-mean-token-mean":
                weights[row] = 1.0 / (len(rows) * outer)
            elif mode == "seq-mean-token-sum-norm":
                weights[row] = 1.0 / (max_length * outer)
    return weights


def combined_advantage(
    reward: float,
    cost_advantage: float | None,
    cost: float | None,
    baseline: float,
    limit: float,
    mode: str,
    lam: float,
    normalize: bool,
) -> float:
    """Combine the advantages of reward and cost: A_R - lambda A_C."""
    if mode == "rectified" and cost_advantage is None and cost is not None:
        cost_advantage = max(cost - limit, 0.0) - baseline
    if mode == "split" and not cost > limit:
        cost_advantage = 0.0
    advantage = reward - lam * (cost_advantage if cost_advantage is not None else 0.0)
    return advantage / (1 + lam) if normalize else advantage


def oracle_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor | None = None,
    *,
    costs: Tensor | None = None,
    cost_baselines: Tensor | None = None,
    cost_mode: str = "rectified",
    lam: float = 0.0,
    cost_limit: float | Tensor = 0.0,
    normalize: bool = False,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    importance_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    beta: float = 0.0,
    kl_estimator: str = "k3",
    kl_importance_weighted: bool = True,
    entropy_coef: float = 0.0,
    loss_agg_mode: str = "token-mean",
    max_length: float | None = None,
    divisor: float | None = None,
    **_: object,
) -> OracleOutput:
    """repo_loss of float64 logits that may require grad; options that only change the output's form are ignored."""
    assert logits.dtype == torch.float64
    leading, vocabulary = tuple(logits.shape[:-1]), logits.shape[-1]
    flat = logits.reshape(-1, vocabulary)
    ids = token_ids.reshape(-1).tolist()
    mask = [True] * len(ids) if response_mask is None else response_mask.reshape(-1).tolist()
    live = {row for row, (token, kept) in enumerate(zip(ids, mask, strict=True)) if kept and token != -100}
    sequences = sequences_of(leading, cu_seqlens)
    sequence_of = {row: s for s, rows in enumerate(sequences) for row in rows}
    weights = row_weights(loss_agg_mode, sequences, live, divisor, max_length)

    def at(value: Tensor | float | None, row: int) -> float | None:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return None if value is None else float(value)
        if tuple(value.shape) == leading:
            return value.reshape(-1)[row].item()
        return value[sequence_of[row]].item()

    def per_row(values: dict[int, Tensor]) -> Tensor:
        zero = torch.zeros((), dtype=torch.float64)
        rows = [values.get(row, zero) for row in range(len(ids))]
        return torch.stack(rows).reshape(leading) if rows else torch.zeros(leading, dtype=torch.float64)

    logps, entropies, kls, losses, sizes = {}, {}, {}, {}, {}
    ratios, log_ratios, advantages, unsafe_rows = {}, {}, {}, set()
    for row in sorted(live):
        by = at(temperature, row)
        logp = log_probs(flat[row], by, softcap)
        logps[row], entropies[row] = logp[ids[row]], entropy_of(logp)
        # on-policy: rho = 1, and its gradient is that of log pi
        old = logps[row].detach() if old_logps is None else old_logps.reshape(-1)[row].double()
        log_ratio = clamped_difference(logps[row], old)
        if old_logps is None and not torch.isfinite(old):
            log_ratio = torch.zeros((), dtype=torch.float64)
        ratio = log_ratio.exp()
        cost, limit = at(costs, row), at(cost_limit, row)
        advantage = combined_advantage(
            at(reward_advantages, row),
            at(cost_advantages, row),
            cost,
            at(cost_baselines, row) or 0.0,
            limit,
            cost_mode,
            lam,
            normalize,
        )
        term = surrogate_of(ratio, advantage, 1 - eps_low, 1 + eps_high, dual_clip)
        if importance_weights is not None:
            term = term * importance_weights.reshape(-1)[row].item()
        surrogate = term.item()
        if ref_logits is not None:
            reference = ref_logits.reshape(-1, vocabulary)[row].double()
            kls[row] = full_kl_of(logp, log_probs(reference, by, softcap))
            term = term + beta * kls[row]
        elif ref_logps is not None:
            delta = clamped_difference(logps[row], ref_logps.reshape(-1)[row].double())
            kls[row] = kl_of(delta, kl_estimator)
            weighted = kl_importance_weighted and kl_estimator in ("k1", "k3")
            term = term + beta * (ratio * kls[row] if weighted else kls[row])
        losses[row] = weights[row] * (term - entropy_coef * entropies[row])
        sizes[row] = abs(surrogate) + abs(term.item() - surrogate) + abs(entropy_coef * entropies[row].item())
        ratios[row], log_ratios[row], advantages[row] = ratio.item(), log_ratio.item(), advantage
        if cost is not None and cost > limit:
            unsafe_rows.add(row)

    live_sequences = [[row for row in rows if row in live] for rows in sequences]
    hinges = [
        max(at(costs, rows[0]) - at(cost_limit, rows[0]), 0.0) if costs is not None else 0.0
        for rows in live_sequences
        if rows
    ]
    low = {r for r in live if ratios[r] < 1 - eps_low and advantages[r] < 0}
    high = {r for r in live if ratios[r] > 1 + eps_high and advantages[r] > 0}
    stats = {
        "tokens": len(live),
        "tokens_unsafe": len(unsafe_rows),
        "sequences": len(hinges),
        "sequences_unsafe": sum(h > 0 for h in hinges),
        "clipped_low_safe": len(low - unsafe_rows),
        "clipped_low_unsafe": len(low & unsafe_rows),
        "clipped_high_safe": len(high - unsafe_rows),
        "clipped_high_unsafe": len(high & unsafe_rows),
        "ratio_sum": sum(ratios.values()),
        "ratio_square_sum": sum(r * r for r in ratios.values()),
        "kl_old_k1_sum": -sum(log_ratios.values()),
        "kl_old_k3_sum": sum(math.expm1(x) - x for x in log_ratios.values()),
        "kl_ref_sum": sum(k.item() for k in kls.values()),
        "entropy_sum": sum(h.item() for h in entropies.values()),
        "rectified_cost_sum": sum(hinges),
        "penalty_sum": lam * sum(hinges),
        "ratio_min": min(ratios.values(), default=1.0),
        "ratio_max": max(ratios.values(), default=1.0),
    }
    per_token = per_row(losses)
    has_reference = ref_logits is not None or ref_logps is not None
    return OracleOutput(
        loss=per_token if loss_agg_mode == "none" else per_token.sum() + 0 * flat[:0].sum(),
        logps=per_row(logps).detach(),
        entropy=per_row(entropies).detach(),
        kl=per_row(kls).detach() if has_reference else None,
        stats={name: float(value) for name, value in stats.items()},
        scale=sum(weights[row] * sizes[row] for row in live),
    )


def oracle_gradient(output: OracleOutput, wrt: Tensor, upstream: Tensor | None = None) -> Tensor:
    """d(loss . upstream)/d(wrt) in float64; zeros where the loss does not depend on it."""
    loss = output.loss.sum() if upstream is None else (output.loss * upstream.double()).sum()
    if not loss.requires_grad:
        return torch.zeros_like(wrt)
    (gradient,) = torch.autograd.grad(loss, wrt, retain_graph=True, allow_unused=True)
    return torch.zeros_like(wrt) if gradient is None else gradient
