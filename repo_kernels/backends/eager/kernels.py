"""The functions of the backend in PyTorch, for any dtype including fp64.

The steps are those of the compiled kernels: row statistics, token terms, gradient. Live rows are taken in chunks of
bounded memory; the result of a row does not depend on its neighbours. Ids are checked, which waits for a GPU: this is
the definition, not the fast path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checks import check_live_ids
from ..interface import ENTROPY_NONE, IGNORED, KL_FULL, KL_NAMES, STATE, TOKENS, Code, LossRows, gradient_buffer
from .terms import coefficients, token_inputs, token_rows, token_terms

CHUNK_ELEMENTS = 1 << 23  # 32 MB of fp32 logits
LOG2_E = 1.4426950408889634


def chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks of at least one row."""
    size = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


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


def distributions(logits: Tensor, temperature: Tensor, softcap: float | None) -> Distributions:
    """Compute the distributions of logits (n, V), which have the compute dtype.

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
    centred = (logits - top) / temperature
    rest = row_sum(centred.exp().scatter_(-1, where, 0.0))
    log_sum = torch.log1p(rest)
    return Distributions(centred - log_sum[:, None], slope, top.squeeze(-1) * (LOG2_E / temperature), log_sum * LOG2_E)


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
    """Compute dL/dlogits (n, V) from the SLOPES (3, n) of the rows; the formula is in terms.py."""
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
    grad /= temperature
    if rows.slope is not None:
        grad *= rows.slope
    return grad


def live_rows(ids: Tensor, vocabulary: int) -> Tensor:
    """Return the flat index (n,) of the live rows and check their ids."""
    live = (ids != IGNORED).nonzero().squeeze(1)
    check_live_ids(ids[live], vocabulary)
    return live


def take_rows(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows of (T, V) or (B, L, V) by flat index into (n, V) of dtype, without copying the whole matrix."""
    if matrix.ndim == 2:
        return matrix[rows].to(dtype)
    length = matrix.shape[1]
    return matrix[rows // length, rows % length].to(dtype)


def put_rows(matrix: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values (n, V) into rows of (T, V) or (B, L, V) by flat index, rounded to the matrix's dtype."""
    if matrix.ndim == 2:
        matrix[rows] = values.to(matrix.dtype)
    else:
        matrix[rows // matrix.shape[1], rows % matrix.shape[1]] = values.to(matrix.dtype)


def zero_dead_rows(grad: Tensor, ids: Tensor) -> None:
    """Fill the gradient rows of dead ids with zeros."""
    dead = (ids == IGNORED).nonzero().squeeze(1)
    put_rows(grad, dead, grad.new_zeros((dead.numel(), grad.shape[-1])))


def new_gradient(logits: Tensor, ids: Tensor) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits; False: it is not filled with zeros."""
    return gradient_buffer(logits), False


def fused(
    logits: Tensor, ref_logits: Tensor | None, rows: LossRows, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute losses (N,) and TOKENS (13, N), and write dL/dlogits times grad_scale into `grad` if it is given."""
    dtype, count = rows.values.dtype, rows.ids.numel()
    code, coef = Code.unpack(rows.code), coefficients(rows.scalars)
    temperature, softcap = coef.temperature, rows.softcap or None
    losses = torch.zeros(count, dtype=dtype, device=logits.device)
    tokens = torch.zeros(len(TOKENS), count, dtype=dtype, device=logits.device)
    live = live_rows(rows.ids, logits.shape[-1])
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        index = live[start:stop]
        ids = rows.ids[index]
        probs = distributions(take_rows(logits, index, dtype), temperature, softcap)
        reference = kl = entropy = None
        if ref_logits is not None and code.kl == KL_FULL:
            reference = distributions(take_rows(ref_logits, index, dtype), temperature, softcap)
            kl = row_full_kl(probs, reference)
        if rows.entropy != ENTROPY_NONE:
            entropy = row_entropy(probs)
        logps, inputs = target_logps(probs, ids), token_inputs(rows.values[:, index], rows.scalars, code)
        terms = token_terms(inputs, logps, entropy, kl, coef, KL_NAMES[code.kl], code.kl_importance_weighted)
        losses[index] = terms.loss
        tokens[:, index] = token_rows(terms, inputs.unsafe, logps, entropy)
        if grad is not None:
            slopes = torch.stack((terms.g_logp, terms.g_entropy, terms.g_kl)) * coef.grad_scale
            put_rows(grad, index, apply_rows(probs, ids, temperature, softcap, slopes, entropy, kl, reference))
    if grad is not None and not zeroed:
        zero_dead_rows(grad, rows.ids)
    return losses, tokens


def statistics(
    logits: Tensor, ref_logits: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float, entropy: int
) -> Tensor:
    """Compute the STATE (7, N) of the rows."""
    temperature, dtype = coefficients(scalars).temperature, scalars.dtype
    state = torch.zeros(len(STATE), ids.numel(), dtype=dtype, device=logits.device)
    live = live_rows(ids, logits.shape[-1])
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        index = live[start:stop]
        probs = distributions(take_rows(logits, index, dtype), temperature, softcap or None)
        state[0, index] = target_logps(probs, ids[index])
        if entropy != ENTROPY_NONE:
            state[1, index] = row_entropy(probs)
        state[3:5, index] = torch.stack((probs.max2, probs.log2_sum))
        if ref_logits is not None:
            reference = distributions(take_rows(ref_logits, index, dtype), temperature, softcap or None)
            state[2, index] = row_full_kl(probs, reference)
            state[5:7, index] = torch.stack((reference.max2, reference.log2_sum))
    return state


def apply(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    scalars: Tensor,
    softcap: float,
    grad: Tensor,
    zeroed: bool = False,
) -> None:
    """Write dL/dlogits into `grad` from the STATE (7, N) of the rows and their SLOPES (3, N)."""
    temperature, dtype = coefficients(scalars).temperature, scalars.dtype
    live = live_rows(ids, logits.shape[-1])
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        index = live[start:stop]
        probs = distributions(take_rows(logits, index, dtype), temperature, softcap or None)
        reference = None
        if ref_logits is not None:
            reference = distributions(take_rows(ref_logits, index, dtype), temperature, softcap or None)
        _, entropy, kl = state[:3, index].unbind(0)
        rows_grad = apply_rows(
            probs, ids[index], temperature, softcap or None, slopes[:, index], entropy, kl, reference
        )
        put_rows(grad, index, rows_grad)
    if not zeroed:
        zero_dead_rows(grad, ids)


def scale_rows(grad: Tensor, upstream: Tensor) -> None:
    """Multiply each row of `grad` by its entry of `upstream` (N,), in place, with one rounding."""
    factor = upstream.reshape(grad.shape[:-1])[..., None]
    if grad.dtype == factor.dtype:
        grad *= factor
    else:
        grad.copy_((grad.to(factor.dtype) * factor).to(grad.dtype))
