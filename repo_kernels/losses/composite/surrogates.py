"""Surrogates that need the log-probabilities of all tokens first: CISPO's, and the ratio of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.codes import CLIPPED_HIGH, CLIPPED_LOW, KL_NAMES, LIVE, UNSAFE, Code
from ...backends.eager.dense import DenseLoss, sequence_counts
from ...backends.eager.terms import TokenInputs, clipped_surrogate, kl_terms, token_log_ratio


def sequence_mean(values: Tensor, prepared: DenseLoss) -> Tensor:
    """Average values (N,), 0 on dead rows, over the live rows of each sequence, and give each row the mean, (N,)."""
    sequence = prepared.sequence
    counts = sequence_counts(prepared.live, sequence, prepared.sequences).clamp_min(1)
    totals = values.new_zeros(max(prepared.sequences, 1)).index_add(0, sequence, values)
    return (totals[: prepared.sequences] / counts)[sequence] if prepared.sequences else values


def rows_and_flags(
    inputs: TokenInputs, logps: Tensor, entropy: Tensor | None, prepared: DenseLoss, code: Code
) -> tuple[Tensor, Tensor]:
    """Compute ROWS (5, N) and the flags (N,) of a loss with code.cispo or code.sequence_ratio.

    CISPO (arXiv:2506.13585): -clip(rho) A log pi, with a constant clip(rho); 0 for a token of probability 0.
    GSPO (arXiv:2507.18071): log rho is the mean over the live tokens of a sequence, each clamped as without it.

    Args:
        inputs: of all rows, 0 on dead ones.
        logps: (N,), 0 on dead rows.
        entropy: (N,) or None if the loss has none.
        prepared: the loss by row.
        code: its options.
    """
    coef = prepared.coef
    log_ratio, inside = token_log_ratio(inputs, logps)
    of_token = log_ratio.exp()
    if code.sequence_ratio:
        log_ratio = sequence_mean(log_ratio, prepared)
    ratio, low, high = log_ratio.exp(), 1 - coef.eps_low, 1 + coef.eps_high
    below, above = ratio < low, ratio > high
    if code.cispo:
        surrogate = -ratio.detach().clamp(low, high) * inputs.advantages * torch.where(logps.isinf(), 0.0, logps)
    else:
        surrogate, _ = clipped_surrogate(ratio, inputs.advantages, low, high, coef.dual_clip)
        below, above = below & (inputs.advantages < 0), above & (inputs.advantages > 0)
    loss, kl = inputs.importance_weights * surrogate, torch.zeros_like(logps)
    if inputs.ref_logps is not None:
        kl, kappa, _ = kl_terms(inputs, logps, of_token, inside, KL_NAMES[code.kl], code.kl_importance_weighted)
        loss = loss + coef.beta * kappa
    if entropy is not None:
        loss = loss - coef.entropy_coef * entropy
    shown = torch.zeros_like(logps) if entropy is None else entropy
    rows = torch.stack((inputs.weights * loss, logps, shown, kl, log_ratio))
    bits = LIVE + inputs.unsafe * UNSAFE + below * CLIPPED_LOW + above * CLIPPED_HIGH
    return rows, bits.to(torch.int32)
