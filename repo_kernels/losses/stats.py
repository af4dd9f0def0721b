"""LossStats: what one call saw, as sums, counts, minima and maxima, so that micro-batches and ranks merge exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.interface import TOKENS

SUMS = (
    "entropy_sum",
    "kl_ref_sum",
    "tokens",
    "tokens_unsafe",
    "clipped_low_safe",
    "clipped_low_unsafe",
    "clipped_high_safe",
    "clipped_high_unsafe",
    "ratio_sum",
    "ratio_square_sum",
    "kl_old_k1_sum",
    "kl_old_k3_sum",  # so far the sums of rows.TOKENS, in its order
    "sequences",
    "sequences_unsafe",
    "rectified_cost_sum",
    "penalty_sum",
)
FIELDS = (*SUMS, "ratio_min", "ratio_max")
_INDEX = {name: i for i, name in enumerate(FIELDS)}


@dataclass(frozen=True)
class LossStats:
    """Statistics of live tokens in one tensor of shape (18,), fp32 (fp64 for fp64 logits), on the logits' device.

    Every accessor returns a 0-d tensor and never syncs. A sequence counts when it has a live token; it is unsafe when
    C > d. Without costs every sequence is safe.

    tokens, tokens_unsafe, sequences, sequences_unsafe: counts.
    clipped_{low,high}_{safe,unsafe}: tokens with rho < 1 - eps_low and A < 0, or rho > 1 + eps_high and A > 0.
    ratio_sum, ratio_square_sum, ratio_min, ratio_max: of rho; minimum and maximum are 1 when there is no token.
    kl_old_k1_sum, kl_old_k3_sum: sum of estimates of KL(pi_old || pi).
    kl_ref_sum: of the chosen estimator, without rho.
    entropy_sum: 0 unless the entropy was computed.
    rectified_cost_sum, penalty_sum: sum over sequences of {C - d}^+ and of lambda {C - d}^+.
    """

    tensor: Tensor

    def __getattr__(self, name: str) -> Tensor:
        if name in _INDEX:
            return self.tensor[_INDEX[name]]
        raise AttributeError(f"LossStats has no statistic {name!r}; it has {', '.join(FIELDS)}")

    def _per_token(self, total: Tensor) -> Tensor:
        return total / self.tokens.clamp_min(1)

    @property
    def ratio_mean(self) -> Tensor:
        """Mean rho; 1 when there is no token."""
        return torch.where(self.tokens > 0, self._per_token(self.ratio_sum), torch.ones_like(self.tokens))

    @property
    def effective_sample_size(self) -> Tensor:
        """(sum rho)^2 / sum rho^2, between 0 and the number of tokens."""
        return self.ratio_sum**2 / self.ratio_square_sum.clamp_min(torch.finfo(self.tensor.dtype).tiny)

    @property
    def clip_fraction(self) -> Tensor:
        """Share of live tokens whose gradient the clip removed."""
        clipped = self.clipped_low_safe + self.clipped_low_unsafe + self.clipped_high_safe + self.clipped_high_unsafe
        return self._per_token(clipped)

    @property
    def unsafe_fraction(self) -> Tensor:
        """Share of sequences with C > d."""
        return self.sequences_unsafe / self.sequences.clamp_min(1)

    @property
    def rectified_cost(self) -> Tensor:
        """Mean over sequences of {C - d}^+."""
        return self.rectified_cost_sum / self.sequences.clamp_min(1)

    @property
    def kl_ref(self) -> Tensor:
        """Mean over tokens of the KL estimate to the reference."""
        return self._per_token(self.kl_ref_sum)

    @property
    def kl_old(self) -> Tensor:
        """Mean over tokens of the k3 estimate of KL(pi_old || pi)."""
        return self._per_token(self.kl_old_k3_sum)

    @property
    def entropy(self) -> Tensor:
        """Mean entropy in nats; 0 unless it was computed."""
        return self._per_token(self.entropy_sum)

    def merge(self, *others: LossStats) -> LossStats:
        """Statistics of the union of the calls: sums add, extremes combine, calls without tokens do not count."""
        merged = self.tensor
        for other in others:
            merged = _merge(merged, other.tensor)
        return LossStats(merged)


def _merge(a: Tensor, b: Tensor) -> Tensor:
    sums = len(SUMS)
    tokens = _INDEX["tokens"]
    low = torch.minimum(a[sums], b[sums])
    high = torch.maximum(a[sums + 1], b[sums + 1])
    extremes = torch.stack((low, high))
    extremes = torch.where(a[tokens] == 0, b[sums:], torch.where(b[tokens] == 0, a[sums:], extremes))
    return torch.cat((a[:sums] + b[:sums], extremes))


def collect_stats(
    tokens: Tensor, live: Tensor, sequence_hinge: Tensor, sequence_live: Tensor, lam: Tensor
) -> LossStats:
    """Reduce the TOKENS (13, N) of the rows and the hinges of S sequences, in a fixed order.

    live: (N,) bool. sequence_hinge: (S,) {C - d}^+ per sequence. sequence_live: (S,) bool, has a live token.
    """
    ratio, hinge_sum = tokens[TOKENS.index("ratio")], row_sum(sequence_hinge)
    if ratio.numel():
        extremes = torch.stack((torch.where(live, ratio, math.inf).amin(), torch.where(live, ratio, -math.inf).amax()))
        extremes = extremes.masked_fill(extremes.isinf(), 1.0)  # no live token
    else:
        extremes = tokens.new_ones(2)
    sequences = torch.stack((sequence_live.sum(), ((sequence_hinge > 0) & sequence_live).sum())).to(tokens.dtype)
    hinges = torch.stack((hinge_sum, lam * hinge_sum))
    return LossStats(torch.cat((tokens[1:].sum(1), sequences, hinges, extremes)))


def row_sum(values: Tensor) -> Tensor:
    """Sum of (n,), 0-d, its bits independent of the number of threads.

    PyTorch splits the reduction over threads when there is a single output, which would change the rounding.
    """
    return values.expand(2, -1).sum(-1)[0]
