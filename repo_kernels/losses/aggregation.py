"""Weights of tokens by loss_agg_mode: the only place that decides what a loss is divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.interface import device_scalar

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "none",
)
SEQUENCE_MODES = MODES[2:5]
MODES_WITHOUT_COUNT = ("token-sum", "none")


def sequence_counts(live: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Count the live tokens of each sequence.

    Args:
        live: (N,) bool.
        sequence: (N,) int64, the index of each row's sequence.
        sequences: S.

    Returns:
        (S,) int64.
    """
    counts = torch.zeros(sequences, dtype=torch.int64, device=live.device)
    return counts.index_add_(0, sequence, live.to(torch.int64))


def token_weights(
    mode: str,
    live: Tensor,
    sequence: Tensor,
    sequences: int,
    dtype: torch.dtype,
    divisor: float | Tensor | None = None,
    max_length: float | None = None,
) -> Tensor:
    """Compute the weights w_t of a loss that is the sum of w_t l_t over live rows.

    Counts are clamped to at least 1, so that the weights are finite without a live token.

    Args:
        mode: one of MODES.
        live: (N,) bool.
        sequence: (N,) int64, the index of each row's sequence.
        sequences: S.
        dtype: of the weights.
        divisor: replaces the outer count: tokens for "token-mean", sequences with a live token for "seq-mean-*".
        max_length: tokens, for "seq-mean-token-sum-norm".

    Returns:
        (N,), 0 on dead rows.
    """
    if mode in MODES_WITHOUT_COUNT:
        return live.to(dtype)
    per_sequence = sequence_counts(live, sequence, sequences)
    outer = live.sum() if mode == "token-mean" else (per_sequence > 0).sum()
    outer = outer.clamp_min(1).to(dtype) if divisor is None else device_scalar(divisor, dtype, live.device)
    if mode == "seq-mean-token-mean":
        inner = per_sequence.clamp_min(1).to(dtype)[sequence]
    elif mode == "seq-mean-token-sum-norm":
        assert max_length is not None
        inner = device_scalar(float(max_length), dtype, live.device)
    else:
        inner = device_scalar(1.0, dtype, live.device)
    return live.to(dtype) / (inner * outer)
