"""RePOTrainer: GRPOTrainer with costs beside the rewards and a multiplier between them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from ...losses.stats import LossStats
from .config import RePOConfig
from .costs import largest_costs, next_lambda, scaled_advantages, statistics
from .loss import add_loss_to_forward, compute_logps, compute_loss, metrics, why_no_linear_loss
from .shared_prompts import why_not_shared

logger = logging.getLogger(__name__)
STATE = "repo_state.json"  # beside TRL's files in a checkpoint
SCORERS = ("reward_funcs", "reward_func_names", "reward_processing_classes")


class RePOTrainer(GRPOTrainer):
    """GRPOTrainer that also takes `cost_funcs`, and penalises what exceeds the cost limit (RePO, arXiv:2410.19933).

    The order within a generation batch: TRL samples it and scores rewards and costs; the advantages are formed, and the
    metrics noted with lambda as `lam`; all losses of the batch, in every micro-batch and iteration, use that lambda;
    after the last of them lambda moves, once, by the mean over the batch of all processes. A lambda that moves before
    the losses would weigh the batch by what it has just learnt from it.

    With several cost functions the cost of a response is the largest of theirs: it is safe iff each of them is at most
    the limit, and none pays for another. A function may return None where it does not apply, but not all of them.

    The advantage is A_R - lambda A_C of values minus the mean of their group. What `scale_rewards` divides by is the
    standard deviation of this combination, so that lambda weighs the same in every group.

    Args:
        model, reward_funcs, args, train_dataset, reward_processing_classes, keywords: of GRPOTrainer; args is a
            RePOConfig.
        cost_funcs: functions or reward models as in reward_funcs, one or a list. Empty: the loss is GRPO's, without
            lambda.
    """

    _tag_names = ["trl", "repo"]  # noqa: RUF012
    _name = "RePO"
    reward_weights: Tensor
    _paper = {  # noqa: RUF012
        "title": "Enhancing Safety in Reinforcement Learning with Human Feedback via Rectified Policy Optimization",
        "id": "2410.19933",
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: RePOConfig | None = None,
        train_dataset: Any = None,
        *,
        cost_funcs: Any = (),
        reward_processing_classes: Any = None,
        **keywords: Any,
    ) -> None:
        if not isinstance(args, RePOConfig):
            raise TypeError(f"args must be a RePOConfig; got {type(args).__name__}")
        rewards, costs = _as_list(reward_funcs), _as_list(cost_funcs)
        classes = _as_list(reward_processing_classes) or [None] * len(rewards)
        weights = args.reward_weights
        if weights is not None:
            args.reward_weights = [*weights, *[0.0] * len(costs)]
        try:  # TRL loads, names and prepares the costs as if they were rewards
            scorers = {
                "reward_funcs": [*rewards, *costs],
                "reward_processing_classes": [*classes, *[None] * len(costs)],
            }
            super().__init__(model, args=args, train_dataset=train_dataset, **scorers, **keywords)
        finally:
            args.reward_weights = weights
        self._take_costs_out(len(rewards), len(costs))
        if self.aux_loss_enabled:
            raise ValueError(
                "router_aux_loss_coef must be 0.0 with RePOTrainer, whose loss has no load-balancing term; "
                f"got {self.router_aux_loss_coef}"
            )
        self.lam: float = args.lam_init
        self._batch: dict[str, float] | None = None  # statistics of a batch whose losses are not all computed
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._why_logps = why_no_linear_loss(self, base)
        self.shares_prompts = False
        if self._why_logps is None:
            for one in (base, self.ref_model and self.accelerator.unwrap_model(self.ref_model)):
                if one is not None:
                    add_loss_to_forward(one)
            why = why_not_shared(base) if args.share_prompts else "share_prompts is False"
            self.shares_prompts = why is None
        if self.accelerator.is_main_process:
            if self._why_logps is None:
                prompts = "once" if self.shares_prompts else f"for each response: {why}"
                logger.info("RePOTrainer: the loss is linear_repo_loss, of hidden states; prompts computed %s", prompts)
            else:
                logger.warning("RePOTrainer: the loss is repo_loss_from_logps, of TRL's log-probs: %s", self._why_logps)

    def _take_costs_out(self, first: int, count: int) -> None:
        """Move the scorers first ... first + count - 1 from TRL's lists of rewards to those of the costs."""
        lists = {name: getattr(self, name) for name in SCORERS}
        self._cost_scorers = {name: values[first : first + count] for name, values in lists.items()}
        self.__dict__.update({name: values[:first] + values[first + count :] for name, values in lists.items()})
        self.reward_weights = torch.cat((self.reward_weights[:first], self.reward_weights[first + count :]))
        if not self.reward_funcs:
            raise ValueError("reward_funcs must hold at least one reward beside cost_funcs; got none")

    def _calculate_rewards(self, *arguments: Any) -> Tensor:
        """Return the rewards of all processes, (B, K), and keep them and the costs."""
        self._reward_scores = super()._calculate_rewards(*arguments)
        if self._cost_scorers["reward_funcs"]:
            rewards = {name: getattr(self, name) for name in SCORERS}
            self.__dict__.update(self._cost_scorers)
            try:
                self._cost_scores = super()._calculate_rewards(*arguments)
            finally:
                self.__dict__.update(rewards)
        return self._reward_scores

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        names = self._cost_scorers["reward_func_names"]
        if not names:
            return output
        training, args = self.model.training, self.args
        costs = largest_costs(self._cost_scores)
        rewards = (self._reward_scores * self.reward_weights.to(costs.device)).nansum(1)
        rewards = rewards.masked_fill(self._reward_scores.isnan().all(1), torch.nan)
        group_size = self.num_generations if training else self.num_generations_eval
        advantages = scaled_advantages(rewards, costs, self.lam, group_size, args)
        rows, rank = len(output["advantages"]), self.accelerator.process_index
        for name, values in {**advantages, "costs": costs}.items():  # of all processes
            output[name] = values[rank * rows : (rank + 1) * rows]
        batch = statistics(costs, args.cost_limit)
        if training:
            self._batch = batch
        means = {f"costs/{name}/mean": x.item() for name, x in zip(names, self._cost_scores.nanmean(0), strict=True)}
        self._note({"lam": self.lam, **batch, **means})
        self._logs["extra"]["cost"].extend(costs.tolist())
        self._logs["extra"]["cost_advantage"].extend(advantages["cost_advantages"].tolist())
        return output

    def _note(self, values: dict[str, float]) -> None:
        """Give values to TRL's log, which averages them until it writes."""
        for name, value in values.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def training_step(self, *arguments: Any, **keywords: Any) -> Tensor:
        loss = super().training_step(*arguments, **keywords)
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0:
            self._finish_batch()
        return loss

    def _finish_batch(self) -> None:
        """Move lambda, if a batch waits for it."""
        if self._batch is not None:
            self.lam, self._batch = next_lambda(self.lam, self._batch, self.args), None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        **others: Any,
    ) -> Any:
        """Compute the log-probabilities of the old policy and the reference with the head that the loss uses."""
        if self._why_logps is not None or others.get("compute_entropy"):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **others
            )
        rows = batch_size or len(input_ids)
        return compute_logps(self, model, input_ids, attention_mask, logits_to_keep, rows), None, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        loss, stats = compute_loss(self, model, inputs, self._why_logps is None)
        together = LossStats(self.accelerator.reduce(stats.tensor, reduction="sum").cpu())
        self._note(metrics(together, bool(self.beta), self._why_logps is None))
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            (folder / STATE).write_text(json.dumps({"lam": self.lam, "batch": self._batch}))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.exists():
            raise FileNotFoundError(
                f"resume_from_checkpoint needs {path}, where RePOTrainer keeps lambda; it is missing"
            )
        state = json.loads(path.read_text())
        self.lam, self._batch = state["lam"], state["batch"]
        self._finish_batch()  # TRL samples anew for the losses that the batch had left


def _as_list(values: Any) -> list[Any]:
    """Return a list of what may be a list, one value or None."""
    return list(values) if isinstance(values, (list, tuple)) else [] if values is None else [values]
