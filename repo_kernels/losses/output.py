"""RepoLossOutput: what a loss returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..backends.codes import ENTROPY_NONE, KL_NONE, ROWS, Code
from ..backends.interface import Loss
from .stats import LossStats


@dataclass(frozen=True)
class RepoLossOutput:
    """The result of a loss. Tensors are fp32, or fp64 for fp64 input; all but `loss` are detached.

    Args:
        loss: 0-d, or the leading shape (T,) or (B, L) with loss_agg_mode="none".
        logps: leading shape, log-probability in nats of each token id; 0 on masked and ignored tokens, as are entropy
            and kl.
        entropy: leading shape, in nats; None without return_entropy and entropy_coef.
        kl: leading shape, the chosen estimator of KL(pi || pi_ref) in nats, without the factor rho; None without a
            reference.
        stats: sums, counts and extremes, which merge over micro-batches and ranks.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    stats: LossStats


def make_output(loss: Loss, value: Tensor, rows: Tensor, stats: Tensor) -> RepoLossOutput:
    """Name the outputs of a loss: its value and, detached, ROWS (5, N) and STATS (18,)."""
    leading = loss.arguments.token_ids.shape

    def row(name: str) -> Tensor:
        values = rows.select(0, ROWS.index(name))
        return values if len(leading) == 1 else values.view(leading)

    return RepoLossOutput(
        loss=value.view(leading) if loss.per_token else value,
        logps=row("logp"),
        entropy=row("entropy") if loss.entropy != ENTROPY_NONE else None,
        kl=row("kl") if Code.unpack(loss.code).kl != KL_NONE else None,
        stats=LossStats(stats),
    )
