"""A loss laid out by row: its arguments as tensors (N,), with defaults for those that are absent."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codes import IGNORED, NO_AGGREGATION, SEQ_TOKEN_MEAN, SEQ_TOKEN_SUM_NORM, TOKEN_MEAN, TOKEN_SUM, Code
from ..interface import Loss, RowArguments, compute_dtype, scalar_vector
from .terms import Coefficients, coefficients

# An absent argument is filled with what changes nothing.
VALUES = {
    "reward_advantages": 0.0,
    "cost_advantages": 0.0,
    "costs": -math.inf,
    "cost_limits": 0.0,
    "cost_baselines": 0.0,
    "old_logps": 0.0,
    "ref_logps": 0.0,
    "importance_weights": 1.0,
}


@dataclass(frozen=True, eq=False)
class DenseLoss:
    """A loss by row.

    Args:
        ids: (N,) int64, IGNORED on dead rows.
        sequence: (N,) int64, the index of each row's sequence; of no meaning on dead rows.
        sequences: S.
        values: by the names of VALUES and "weights", (N,) of the compute dtype.
        coef: the scalars.
        temperature: of all rows, 0-d, or by row, (N,), 1 on dead rows; compute dtype.
    """

    ids: Tensor
    sequence: Tensor
    sequences: int
    values: dict[str, Tensor]
    coef: Coefficients
    temperature: Tensor

    @property
    def live(self) -> Tensor:
        """Which rows are live, (N,) bool."""
        return self.ids != IGNORED


def prepare(logits: Tensor, loss: Loss) -> DenseLoss:
    """Lay the loss out by row."""
    arguments, dtype, code = loss.arguments, compute_dtype(logits), Code.unpack(loss.code)
    ids, sequence = row_sequences(arguments)
    coef = coefficients(scalar_vector(loss.scalars, dtype, logits.device))
    values = {name: _spread(arguments, name, absent, sequence, dtype) for name, absent in VALUES.items()}
    if arguments.cost_limits is None:
        # rounded as the costs are, so that C = d is safe also for fp32 costs with fp64 logits
        rounding = dtype if arguments.costs is None else arguments.costs.dtype
        values["cost_limits"] = coef.cost_limit.to(rounding).to(dtype).expand(ids.numel())
    divisor = coef.divisor if code.divisor else None
    live = ids != IGNORED
    values["weights"] = token_weights(
        code.aggregation, live, sequence, arguments.sequences, dtype, divisor, coef.max_length
    )
    temperature = coef.temperature
    if arguments.temperatures is not None:
        temperature = torch.where(live, _spread(arguments, "temperatures", 1.0, sequence, dtype), 1.0)
    return DenseLoss(ids, sequence, arguments.sequences, values, coef, temperature)


def row_sequences(arguments: RowArguments) -> tuple[Tensor, Tensor]:
    """Return ids (N,), IGNORED on dead rows, and the index of each row's sequence (N,)."""
    ids, bounds, leading = arguments.token_ids.reshape(-1), arguments.cu_seqlens, arguments.leading
    if arguments.response_mask is not None:
        ids = torch.where(arguments.response_mask.reshape(-1), ids, IGNORED)
    index = torch.arange(ids.numel(), device=ids.device)
    if bounds is not None:
        inside = (index >= bounds[0]) & (index < bounds[-1])
        last = max(arguments.sequences - 1, 0)
        sequence = torch.bucketize(index, bounds[1:].to(torch.int64), right=True).clamp_max(last)
        return torch.where(inside, ids, IGNORED), sequence
    if len(leading) == 2:
        return ids, index // max(leading[1], 1)
    return ids, index


def _spread(arguments: RowArguments, name: str, absent: float, sequence: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (N,): the values of a per-token tensor, or for each row the entry of its sequence."""
    value = getattr(arguments, name)
    if value is None or not value.numel():
        return torch.full(sequence.shape, absent, dtype=dtype, device=sequence.device)
    if tuple(value.shape) == arguments.leading:
        return value.detach().reshape(-1).to(dtype)
    return value.detach().to(dtype)[sequence]


def token_weights(
    aggregation: int,
    live: Tensor,
    sequence: Tensor,
    sequences: int,
    dtype: torch.dtype,
    divisor: Tensor | None,
    max_length: Tensor,
) -> Tensor:
    """Compute the weights w_t of a loss that is the sum of w_t l_t over live rows.

    Counts are clamped to at least 1, so that the weights are finite without a live token.

    Args:
        aggregation: index into AGGREGATIONS.
        live: (N,) bool.
        sequence: (N,) int64, the index of each row's sequence.
        sequences: S.
        dtype: of the weights.
        divisor: 0-d or None; replaces the outer count: tokens for "token-mean", sequences with a live token for
            "seq-mean-*".
        max_length: 0-d, tokens, for "seq-mean-token-sum-norm".

    Returns:
        (N,), 0 on dead rows.
    """
    if aggregation in (TOKEN_SUM, NO_AGGREGATION):
        return live.to(dtype)
    per_sequence = sequence_counts(live, sequence, sequences)
    outer = live.sum() if aggregation == TOKEN_MEAN else (per_sequence > 0).sum()
    total = outer.clamp_min(1).to(dtype) if divisor is None else divisor
    if aggregation == SEQ_TOKEN_MEAN:
        total = per_sequence.clamp_min(1).to(dtype)[sequence] * total if sequences else total
    elif aggregation == SEQ_TOKEN_SUM_NORM:
        total = max_length * total
    return live.to(dtype) / total


def sequence_counts(live: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Count the live tokens of each sequence, (S,) int64."""
    counts = torch.zeros(max(sequences, 1), dtype=torch.int64, device=live.device)
    return counts.index_add(0, sequence, live.to(torch.int64))[:sequences]
