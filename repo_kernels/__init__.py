"""Fused losses for safe RLHF: clipped surrogate, rectified cost, KL and entropy, with their gradient.

    from repo_kernels import repo_loss
    out = repo_loss(logits, token_ids, old_logps, reward_advantages, costs=costs, lam=1.0)
    out.loss.backward()

or, with the options of a run set once:

    from repo_kernels import LossOptions, RepoLoss
    loss = RepoLoss(LossOptions(eps_high=0.28, kl_estimator="k3"))
    out = loss(logits, token_ids, old_logps, reward_advantages, costs=costs, lam=1.0)
"""

from importlib.metadata import version

from .losses.heads.lora import LoraHead
from .losses.logps import linear_selective_log_softmax, selective_log_softmax
from .losses.loss import linear_repo_loss, repo_loss, repo_loss_from_logps
from .losses.modules import LinearRepoLoss, RepoLoss
from .losses.options import LossOptions
from .losses.output import RepoLossOutput
from .losses.stats import LossStats
from .rollout_weights import RolloutWeights, truncated_importance_weights

__all__ = [
    "LinearRepoLoss",
    "LoraHead",
    "LossOptions",
    "LossStats",
    "RepoLoss",
    "RepoLossOutput",
    "RolloutWeights",
    "linear_repo_loss",
    "linear_selective_log_softmax",
    "repo_loss",
    "repo_loss_from_logps",
    "selective_log_softmax",
    "truncated_importance_weights",
]

__version__: str


def __getattr__(name: str) -> str:
    """Read `__version__` from the installed package, where pyproject.toml has put it."""
    if name == "__version__":
        return version("repo-rlhf")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
