"""Distributions over the vocabulary: log-probabilities, entropy, full KL and the gradient of n rows of logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.4426950408889634


def row_sum(values: Tensor) -> Tensor:
    """Sum (n, V) over its last dimension, so that the bits of a row do not depend on n.

    PyTorch splits a reduction with a single output over threads, which changes the rounding; hence two outputs.
    """
    if values.shape[0] == 1:
        return values.expand(2, -1).sum(-1)[:1]
    return values.sum(-1)


@dataclass(frozen=True)
class Distributions:
    """Log-probabilities of n rows over the vocabulary, and what the gradient needs besides.

    Args:
        log_probs: (n, V), log softmax(softcap(logits) / temperature).
        slope: (n, V), d softcap(z) / dz; None without a softcap.
        max2, log2_sum: (n,), as in STATE.
    """

    log_probs: Tensor
    slope: Tensor | None
    max2: Tensor
    log2_sum: Tensor

    @property
    def probs(self) -> Tensor:
        """Probabilities, (n, V)."""
        return self.log_probs.exp()


def divisors(temperature: Tensor) -> Tensor:
    """Return temperatures, 0-d or (n,), so that rows (n, V) can be divided by them.

    One that is not positive and finite becomes NaN, and so does what is divided by it.
    """
    usable = torch.where((temperature > 0) & (temperature < torch.inf), temperature, torch.nan)
    return usable[:, None] if usable.ndim else usable


def distributions(logits: Tensor, temperature: Tensor, softcap: float | None) -> Distributions:
    """Compute the distributions of logits (n, V), which have the compute dtype, at temperature 0-d or (n,).

    The maximum is subtracted before the division by the temperature: that difference is exact, one of scaled values is
    not. The sum leaves the maximum out and goes through log1p, which keeps the digits of 1 - p_y when p_y -> 1.
    """
    slope = None
    if softcap is not None:
        # 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2|x|) does not cancel where the cap saturates
        decay = torch.exp(-2 * (logits / softcap).abs())
        slope = 4 * decay / (1 + decay) ** 2
        logits = softcap * torch.tanh(logits / softcap)
    top, where = logits.max(-1, keepdim=True)
    by = divisors(temperature)
    centred = (logits - top) / by
    rest = row_sum(centred.scatter(-1, where, -torch.inf).exp_())
    log_sum = torch.log1p(rest)
    max2 = (top * (LOG2_E / by)).squeeze(-1)
    return Distributions(centred - log_sum[:, None], slope, max2, log_sum * LOG2_E)


def target_logps(rows: Distributions, ids: Tensor) -> Tensor:
    """Return the log-probability of each row's id, (n,)."""
    return rows.log_probs.gather(-1, ids[:, None]).squeeze(-1)


def finite_log(log_probs: Tensor) -> Tensor:
    """Replace -inf by the lowest finite value, so that p log p is 0 and not NaN where p = 0."""
    return log_probs.clamp_min(torch.finfo(log_probs.dtype).min)


def row_entropy(rows: Distributions) -> Tensor:
    """Compute H = -sum_v p_v log p_v, (n,)."""
    return -row_sum(rows.probs * finite_log(rows.log_probs))


def log_prob_difference(rows: Distributions, reference: Distributions) -> Tensor:
    """Compute log p_v - log q_v, (n, V); 0 where p_v = 0."""
    difference = rows.log_probs - reference.log_probs
    return torch.where(rows.probs == 0, torch.zeros_like(difference), difference)


def row_full_kl(rows: Distributions, reference: Distributions) -> Tensor:
    """Compute KL(p || q) = sum_v p_v (log p_v - log q_v), (n,)."""
    return row_sum(rows.probs * log_prob_difference(rows, reference))


def apply_rows(
    rows: Distributions,
    ids: Tensor,
    temperature: Tensor,
    softcap: float | None,
    slopes: Tensor,
    entropy: Tensor | None,
    kl: Tensor | None,
    reference: Distributions | None,
) -> Tensor:
    """Compute dL/dlogits (n, V) from the SLOPES (3, n) of the rows; the formula is in terms.py.

    temperature: 0-d or (n,).
    """
    probs, (g_logp, g_entropy, g_kl) = rows.probs, slopes.unbind(0)
    grad = -g_logp[:, None] * probs
    # d(log p_y)/dz_y = 1 - p_y, taken as -expm1(log p_y): no cancellation when p_y -> 1
    target = g_logp * -torch.expm1(target_logps(rows, ids))
    grad.scatter_(-1, ids[:, None], target[:, None])
    if entropy is not None:
        # dH/dz_v = -p_v (log p_v + H)
        grad -= g_entropy[:, None] * probs * (finite_log(rows.log_probs) + entropy[:, None])
    if kl is not None and reference is not None:
        # dKL/dz_v = p_v (log p_v - log q_v - KL)
        grad += g_kl[:, None] * probs * (log_prob_difference(rows, reference) - kl[:, None])
    grad /= divisors(temperature)
    if rows.slope is not None:
        grad *= rows.slope
    return grad
