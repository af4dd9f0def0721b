"""Registers `repo` with verl as an advantage estimator, a policy loss and a trainer mode.

verl imports it in each of its processes: VERL_USE_EXTERNAL_MODULES=repo_kernels.integrations.verl.plugin
"""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

try:
    import transfer_queue as tq
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
    from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
except ModuleNotFoundError as error:
    if error.name not in ("verl", "transfer_queue"):
        raise
    raise ImportError("repo_kernels.integrations.verl.plugin needs verl: pip install 'repo-rlhf[verl]'") from error

from .costs import CostConstraint, CostSettings
from .loss import policy_loss

NAME = "repo"
current: ContextVar[CostConstraint | None] = ContextVar("current", default=None)
"""The constraint of the trainer that computes advantages, since verl hands an estimator the rewards alone."""


@register_adv_est(NAME)
def compute_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, config: Any, **_: Any
) -> tuple[Tensor, Tensor]:
    """Compute A_R - lambda A_C of each token, with the group means of reward and {C - d}^+ as baselines.

    token_level_rewards, response_mask: (B, R). index: (B,) uid of each prompt. config: verl's section `algorithm`, of
    which norm_adv_by_std_in_grpo is read. Returns the advantages twice, (B, R), as verl's estimator `grpo` does.
    """
    constraint = current.get()
    if constraint is None:
        raise RuntimeError("algorithm.adv_estimator=repo needs trainer.v1.trainer_mode=repo, which reads the costs")
    by_std = config.get("norm_adv_by_std_in_grpo", True)
    advantages = constraint.advantages(token_level_rewards.sum(-1), index, by_std).unsqueeze(-1) * response_mask
    return advantages, advantages


register_policy_loss(NAME)(policy_loss)


@register_trainer(NAME)
class RepoTrainer(PPOTrainerSync):
    """verl's synchronous trainer, which also reads the costs, logs them and moves lambda (RePO, arXiv:2410.19933).

    The order in a step: verl samples and scores the batch; its advantages are formed, and the metrics noted with lambda
    as `repo/lam`; all losses of the batch, in every epoch and mini-batch, use them; then lambda moves, once. Lambda is
    in each checkpoint. Settings: `trainer.v1.repo`, see CostSettings.
    """

    def __init__(self, config: Any) -> None:
        if config.algorithm.adv_estimator != NAME:
            raise ValueError(
                f"algorithm.adv_estimator must be repo with trainer_mode=repo; got {config.algorithm.adv_estimator!r}"
            )
        if config.actor_rollout_ref.rollout.n < 2:
            raise ValueError(
                "actor_rollout_ref.rollout.n must be >= 2, as the baseline is the mean of a group; "
                f"got {config.actor_rollout_ref.rollout.n}"
            )
        self.constraint = CostConstraint(CostSettings(**config.trainer.v1.get(NAME, {})))
        config.trainer.v1.trainer_mode = "sync"  # which verl compares with, in here and elsewhere
        super().__init__(config)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        padding = [bool(tag.get("is_padding", False)) for tag in batch.tags]
        metrics.update(self.constraint.begin(self._infos(batch), padding))
        token = current.set(self.constraint)
        try:
            return super()._compute_advantage(batch, metrics)
        finally:
            current.reset(token)

    def _infos(self, batch: Any) -> list[dict[str, Any]]:
        """Return what the reward function returned for each row of the batch, in its order."""
        sessions = [key.rsplit("_", 1)[0] for key in batch.keys]
        if len({*sessions}) < len(sessions):
            raise ValueError("trainer_mode=repo takes one output of the agent loop for each sample; got several")
        if self.reward_loop_manager.reward_loop_worker_handles is None:  # scored by a colocated reward model
            name = self.constraint.settings.cost_key
            return [{name: value} for value in self._column(batch, name)]
        return [fields.get("reward_extra_info", {}) for fields in self._column(batch, "extra_fields")]

    def _column(self, batch: Any, name: str) -> list[Any]:
        """Read a field of each row, which TransferQueue returns as a list of its own, a stack, an array or a tensor."""
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[name])
        return data[name].tolist() if hasattr(data[name], "tolist") else list(data[name])

    def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any:
        batch = super()._update_actor(batch, metrics)
        self.constraint.finish()
        return batch

    def _save_checkpoint(self) -> None:
        # before verl names the checkpoint as the latest, so that none without lambda is ever resumed
        self.constraint.save(Path(self.config.trainer.default_local_dir) / f"global_step_{self.global_steps}")
        super()._save_checkpoint()

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.global_steps:
            trainer = self.config.trainer
            folder = Path(trainer.default_local_dir) / f"global_step_{self.global_steps}"
            self.constraint.load(trainer.resume_from_path if trainer.resume_mode == "resume_path" else folder)
