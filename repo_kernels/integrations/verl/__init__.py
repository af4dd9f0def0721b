"""RePO in verl: an advantage estimator, a policy loss and a trainer, all registered as `repo`.

    VERL_USE_EXTERNAL_MODULES=repo_kernels.integrations.verl.plugin python -m verl.trainer.main_ppo \\
        trainer.v1.trainer_mode=repo algorithm.adv_estimator=repo actor_rollout_ref.actor.policy_loss.loss_mode=repo \\
        +trainer.v1.repo.cost_limit=0.0 ...

This package and its modules `costs` and `loss` do not import verl; `plugin` does, and registers the three.
"""

from .costs import CostConstraint, CostSettings
from .loss import policy_loss

__all__ = ["CostConstraint", "CostSettings", "policy_loss"]
