"""LossStats: statistics of one call as sums, counts, minima and maxima, which merge over micro-batches and ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.codes import STATS
from ..tensor_kinds import has_values, is_plain, is_traced

SUMS = STATS[:-2]
_INDEX = {name: i for i, name in enumerate(STATS)}


@dataclass(frozen=True)
class LossStats:
    """Statistics of the live tokens and their sequences.

    Each name below, and each property, is a 0-d tensor; reading one does not wait for the device. A sequence counts if
    it has a live token, and is unsafe if C > d. Without costs every sequence is safe.

    tokens, tokens_unsafe, sequences, sequences_unsafe: counts.
    clipped_{low,high}_{safe,unsafe}: tokens with rho < 1 - eps_low and A < 0, or with rho > 1 + eps_high and A > 0;
        whatever A with surrogate="cispo".
    ratio_sum, ratio_square_sum, ratio_min, ratio_max: of rho; minimum and maximum are 1 without a token.
    kl_old_k1_sum, kl_old_k3_sum: estimates of KL(pi_old || pi) in nats, summed over tokens.
    kl_ref_sum: the chosen estimate of KL(pi || pi_ref) in nats without the factor rho, summed over tokens.
    entropy_sum: in nats, summed over tokens; 0 unless it was computed.
    rectified_cost_sum: {C - d}^+, summed over sequences.
    penalty_sum: lam {C - d}^+, summed over sequences, whatever the cost_mode; 0 if lam is, as it is where the caller
        combines the advantages of reward and cost itself.

    Args:
        tensor: (18,), fp32 (fp64 for fp64 logits), on the logits' device, in the order of STATS (backends/codes.py).
    """

    tensor: Tensor

    def __getattr__(self, name: str) -> Tensor:
        if name in _INDEX:
            return self.tensor[_INDEX[name]]
        raise AttributeError(f"LossStats has no statistic {name!r}; it has {', '.join(STATS)}")

    def __repr__(self) -> str:
        if is_traced() or not is_plain(self.tensor) or not has_values(self.tensor):
            return f"LossStats({self.tensor})"
        values = zip(STATS, self.tensor.tolist(), strict=True)
        return f"LossStats({', '.join(f'{name}={value:.6g}' for name, value in values)})"

    def _per_token(self, total: Tensor) -> Tensor:
        return total / self.tokens.clamp_min(1)

    @property
    def ratio_mean(self) -> Tensor:
        """Mean of rho over tokens; 1 without a token."""
        return torch.where(self.tokens > 0, self._per_token(self.ratio_sum), torch.ones_like(self.tokens))

    @property
    def effective_sample_size(self) -> Tensor:
        """Effective sample size of the ratios, (sum rho)^2 / sum rho^2: from 0 to the number of tokens."""
        return self.ratio_sum**2 / self.ratio_square_sum.clamp_min(torch.finfo(self.tensor.dtype).tiny)

    @property
    def clip_fraction(self) -> Tensor:
        """Share of live tokens whose surrogate gradient the clip of rho sets to 0; dual_clip's are not counted."""
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
        """Mean over tokens of the estimate of KL(pi || pi_ref), in nats."""
        return self._per_token(self.kl_ref_sum)

    @property
    def kl_old(self) -> Tensor:
        """Mean over tokens of the k3 estimate of KL(pi_old || pi), in nats."""
        return self._per_token(self.kl_old_k3_sum)

    @property
    def entropy(self) -> Tensor:
        """Mean over tokens of the entropy, in nats; 0 unless it was computed."""
        return self._per_token(self.entropy_sum)

    def merge(self, *others: LossStats) -> LossStats:
        """Return the statistics of all calls together: sums add up, extremes combine, calls without tokens drop out."""
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
