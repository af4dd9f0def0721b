"""Fused losses for safe RLHF: log-prob ratio, clipped surrogate, KL, entropy and the rectified cost hinge.

from repo_kernels import repo_loss
out = repo_loss(logits, token_ids, old_logps, reward_advantages, costs=costs, lam=1.0)
out.loss.backward()
"""

from .losses.logprobs import linear_selective_log_softmax, selective_log_softmax
from .losses.loss import RepoLossOutput, linear_repo_loss, repo_loss
from .losses.stats import LossStats

__all__ = [
    "LossStats",
    "RepoLossOutput",
    "linear_repo_loss",
    "linear_selective_log_softmax",
    "repo_loss",
    "selective_log_softmax",
]
