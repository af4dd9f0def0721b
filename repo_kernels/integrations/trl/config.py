"""RePOConfig: the fields of GRPOConfig and those of the cost, checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig

from ...checks import COST_MODES, check_choice, check_scalar

# GRPOConfig.loss_type -> loss_agg_mode. TRL clips alike in all of them but "cispo".
AGGREGATIONS = {
    "grpo": "seq-mean-token-mean",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "luspo": "seq-mean-token-sum",
}
# Fields of GRPOConfig whose other values change the loss per token in a way that RePO's loss does not have.
ONLY: dict[str, Any] = {
    "multi_objective_aggregation": "sum_then_normalize",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
}


def _cost_field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RePOConfig(GRPOConfig):
    """GRPOConfig with a limit of the cost and the rule of its multiplier lambda.

    Args:
        cost_limit: d, in units of the costs: a response is safe iff C <= d.
        lam_init: lambda of the first generation batch, in [0, lam_max]; > 0 for cost_mode "lagrangian".
        lam_lr: lambda grows by lam_lr * mean {C - d}^+ after each generation batch; >= 0, 0 keeps it.
        lam_max: upper bound of lambda, > 0.
        cost_mode: "rectified" (the advantage of {C - d}^+), "split" (that of C, on unsafe responses only) or
            "lagrangian" (that of C on all; lambda then moves both ways, by the mean of C - d).
        share_prompts: compute a prompt once for all its responses in a micro-batch, where the model allows it.

    Raises:
        TypeError, ValueError: a field has a wrong type or value, or a field of GRPOConfig has a value that the loss
            cannot take. The message names the field, what it got and what it takes.
    """

    cost_limit: float = _cost_field(0.0, "Limit d of the cost: a response is safe iff its cost is at most d.")
    lam_init: float = _cost_field(1.0, "Lambda of the first generation batch.")
    lam_lr: float = _cost_field(0.1, "Step of lambda per unit of the mean excess of the cost over the limit.")
    lam_max: float = _cost_field(5.0, "Upper bound of lambda.")
    cost_mode: str = _cost_field("rectified", "What lambda penalises: 'rectified', 'split' or 'lagrangian'.")
    share_prompts: bool = _cost_field(True, "Compute a prompt once for all its responses in a micro-batch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("cost_mode", self.cost_mode, COST_MODES)
        check_scalar("cost_limit", self.cost_limit, lambda x: True, "finite")
        check_scalar("lam_lr", self.lam_lr, lambda x: x >= 0, ">= 0")
        check_scalar("lam_max", self.lam_max, lambda x: x > 0, "> 0")
        least = "> 0" if self.cost_mode == "lagrangian" else ">= 0"
        check_scalar(
            "lam_init",
            self.lam_init,
            lambda x: (x > 0 if least == "> 0" else x >= 0) and x <= self.lam_max,
            f"{least} and <= lam_max = {self.lam_max}",
        )
        self._check_grpo_fields()

    def _check_grpo_fields(self) -> None:
        check_choice("loss_type", self.loss_type, tuple(AGGREGATIONS))
        check_choice("importance_sampling_level", self.importance_sampling_level, ("token", "sequence"))
        check_choice("scale_rewards", self.scale_rewards, ("group", "batch", "none"))
        for name, value in ONLY.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} must be {value!r}, which is all that RePO's loss has; got {getattr(self, name)!r}"
                )
        self._check_clip()
        if self.importance_sampling_level == "sequence" and self.beta and self.use_bias_correction_kl:
            raise ValueError(
                "use_bias_correction_kl must be False with importance_sampling_level='sequence' and beta > 0, since "
                "RePO's loss weighs the KL of a token by that token's ratio; got True"
            )

    def _check_clip(self) -> None:
        if self.loss_type == "cispo":
            takes = ">= 1 with loss_type='cispo', where it is the largest ratio"
            check_scalar("epsilon_high", self.clip_high, lambda x: x >= 1, takes)
            if self.delta is not None:
                raise ValueError(f"delta must be None with loss_type='cispo', which does not read it; got {self.delta}")
            return
        check_scalar("epsilon", self.epsilon, lambda x: 0 <= x <= 1, "in [0, 1]")
        if self.epsilon_high is not None:
            check_scalar("epsilon_high", self.epsilon_high, lambda x: x >= 0, ">= 0 or None")
        highest = 1 + self.clip_high
        if self.delta is not None:
            check_scalar("delta", self.delta, lambda x: x >= highest, f">= 1 + epsilon_high = {highest} or None")

    @property
    def clip_high(self) -> float:
        """Return epsilon_high or, where that is None, epsilon, as GRPOTrainer does."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def loss_options(self) -> dict[str, Any]:
        """Return the fields of the losses' options, under their names there."""
        options = {
            "cost_mode": self.cost_mode,
            "eps_low": self.epsilon,
            "eps_high": self.clip_high,
            "dual_clip": self.delta,
            "kl_importance_weighted": self.use_bias_correction_kl,
            "loss_agg_mode": AGGREGATIONS[self.loss_type],
        }
        if self.importance_sampling_level == "sequence":
            options["ratio_level"] = "sequence"
        if self.loss_type == "cispo":
            options |= {"surrogate": "cispo", "eps_low": 1.0, "eps_high": self.clip_high - 1}
        if self.loss_type == "dr_grpo":
            options["max_length"] = self.max_completion_length
        return options
