"""verl's policy loss, computed by `repo_loss_from_logps`: what verl calls each option, and how it averages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...losses.loss import repo_loss_from_logps

MODES = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute the loss of verl's policy loss `vanilla`; the estimator `repo` has put the cost into the advantages.

    Args:
        old_log_prob, log_prob: (B, R) log-probabilities in nats of the policy that sampled and of the current one.
        advantages: (B, R), A_R - lambda A_C.
        response_mask: (B, R), bool or 0 and 1.
        loss_agg_mode: verl's, all five.
        config: verl's ActorConfig, of which clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c (dual clip) and
            global_batch_info are read.
        rollout_is_weights: (B, R), weights of the rollout correction, or None.

    Returns:
        (loss, 0-d; metrics). With several processes the loss is multiplied by their number, as verl's is, since the
        gradients are averaged over them.

    Raises:
        ValueError: loss_agg_mode is none of verl's, or the counts over all processes are missing with several.
    """
    if loss_agg_mode not in MODES:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(MODES)}; got {loss_agg_mode!r}")
    info = config.global_batch_info
    processes = info.get("dp_size") or 1
    name = "batch_num_tokens" if loss_agg_mode == "token-mean" else "global_batch_size"
    count = None if loss_agg_mode == "token-sum" else info.get(name)
    if count is None and processes > 1 and loss_agg_mode != "token-sum":
        raise ValueError(f"global_batch_info needs {name} with dp_size = {processes}; got None")
    length = None
    if loss_agg_mode == "seq-mean-token-sum-norm":
        length = info.get("loss_scale_factor") or response_mask.shape[-1]
    low, high = (config.clip_ratio if x is None else x for x in (config.clip_ratio_low, config.clip_ratio_high))
    out = repo_loss_from_logps(
        _full(log_prob),
        _full(old_log_prob),
        reward_advantages=_full(advantages),
        response_mask=response_mask,
        importance_weights=None if rollout_is_weights is None else _full(rollout_is_weights),
        eps_low=low,
        eps_high=high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        loss_agg_mode=loss_agg_mode,
        max_length=length,
        divisor=None if count is None else count / processes,
    )
    loss = out.loss * processes if loss_agg_mode == "token-sum" else out.loss
    stats = out.stats
    metrics = {
        "actor/pg_clipfrac": stats.clip_fraction,
        "actor/ppo_kl": stats.kl_old_k1_sum / stats.tokens.clamp_min(1),
    }
    return loss, {key: value.item() for key, value in metrics.items()}


def _full(values: Tensor) -> Tensor:
    """Return log-probabilities, advantages or weights in fp32 where a model gave them in half precision."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values
