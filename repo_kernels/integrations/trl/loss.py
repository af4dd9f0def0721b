"""The losses of this library on the tensors of a GRPOTrainer's micro-batch."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from ...backends.codes import IGNORED
from ...losses.logps import linear_selective_log_softmax
from ...losses.loss import linear_repo_loss, repo_loss_from_logps
from ...losses.stats import LossStats
from .shared_prompts import states_before

SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def why_no_linear_loss(trainer: Any, model: Any) -> str | None:
    """Return why `linear_repo_loss` cannot take the head of a causal language model, or None if it can."""
    head, config, name = model.get_output_embeddings(), model.config.get_text_config(), type(model).__name__
    if type(head) is not nn.Linear:
        return f"the head of {name} is a {type(head).__name__}, no torch.nn.Linear"
    for scale in SCALES:
        if (value := getattr(config, scale, None)) not in (None, 1.0):
            return f"{name} scales its logits ({scale} = {value})"
    if trainer._is_vlm:
        return "prompts may hold images"
    return "FSDP or DeepSpeed shards the head" if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled else None


def add_loss_to_forward(model: Any) -> None:
    """Let model(input_ids, attention_mask, repo_loss=f, count=T, share=...) return f(states, head).

    The states are those that predict the last T tokens, (B, T, H): `states_before`. Other calls stay as they are.

    The loss is part of the forward pass for the sake of DistributedDataParallel, which looks for the parameters used.
    """
    forward = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def with_loss(self: Any, *args: Any, repo_loss: Any = None, **keywords: Any) -> Any:
        if repo_loss is None:
            return forward(*args, **keywords)
        arguments = {name: keywords[name] for name in ("input_ids", "attention_mask", "count", "share")}
        return repo_loss(states_before(self.base_model, **arguments), self.get_output_embeddings())

    model.forward = types.MethodType(with_loss, model)


def compute_loss(trainer: Any, model: Any, inputs: dict[str, Any], linear: bool) -> tuple[Tensor, LossStats]:
    """Compute the loss of a micro-batch, scaled as GRPOTrainer scales its own, and its statistics.

    Args:
        model: the wrapped model; with `linear` its forward takes repo_loss (`add_loss_to_forward`).
        inputs: what GRPOTrainer passes to _compute_loss, and with a cost `costs` and `cost_advantages`, (B,) each.
        linear: by `linear_repo_loss` on hidden states, else by `repo_loss_from_logps` on TRL's log-probabilities.
    """
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    whole = (
        torch.cat((inputs["prompt_ids"], ids), 1),
        torch.cat((inputs["prompt_mask"], mask), 1),
        ids.shape[1],
    )
    if "tool_mask" in inputs:
        mask = mask * inputs["tool_mask"]
    values = trainer.args.loss_options() | _values(trainer, inputs, mask)
    if not linear:
        log_probs = GRPOTrainer._get_per_token_logps_and_entropies
        extra = {name: inputs[name] for name in inspect.signature(log_probs).parameters if name in inputs}
        out = repo_loss_from_logps(log_probs(trainer, model, *whole, **extra)[0], **values)
        return out.loss, out.stats

    def loss_of(hidden: Tensor, weight: Tensor, **head: Any) -> tuple[Tensor, Tensor]:
        out = linear_repo_loss(hidden, weight, ids, return_entropy=True, **head, **values)
        return out.loss, out.stats.tensor

    loss, stats = _run(trainer, model, *whole, loss_of)
    return loss, LossStats(stats)


def compute_logps(trainer: Any, model: Any, ids: Tensor, attention_mask: Tensor, count: int, batch_size: int) -> Tensor:
    """Compute the log-probabilities of the last `count` tokens with the head of the loss, (B, count); 0 where masked.

    TRL's head rounds otherwise in bf16, so that the ratio of a policy to itself would not be 1.

    ids, attention_mask: (B, L). batch_size: rows of a forward pass.
    """
    logps = []
    for rows in torch.arange(len(ids), device=ids.device).split(batch_size):
        targets = ids[rows, -count:].masked_fill(attention_mask[rows, -count:] == 0, IGNORED)
        of_targets = functools.partial(linear_selective_log_softmax, token_ids=targets)
        logps.append(_run(trainer, model, ids[rows], attention_mask[rows], count, of_targets))
    return torch.cat(logps)


def _run(trainer: Any, model: Any, ids: Tensor, attention_mask: Tensor, count: int, use: Callable[..., Any]) -> Any:
    """Run the model and return use(hidden, weight, ...) for the positions before the last `count` tokens."""

    def of_hidden(hidden: Tensor, head: nn.Linear) -> Any:
        hidden = _cast(hidden, trainer.args.cast_lm_head_to_fp32)
        softcap = getattr(trainer.model.config.get_text_config(), "final_logit_softcapping", None)
        return use(hidden, head.weight, bias=head.bias, temperature=trainer.temperature, softcap=softcap)

    where = {"input_ids": ids, "attention_mask": attention_mask, "count": count}
    with trainer.accelerator.autocast():
        return model(**where, share=trainer.shares_prompts, repo_loss=of_hidden)


def _values(trainer: Any, inputs: dict[str, Any], mask: Tensor) -> dict[str, Any]:
    """Return the tensors and scalars of the losses; mask: (B, T), which tokens count."""
    args, training = trainer.args, trainer.model.training
    parts = trainer.current_gradient_accumulation_steps if training else 1
    divisor: float | Tensor = len(mask) * parts
    if args.loss_type == "bnpo":
        divisor = mask.sum().clamp(min=1) * parts
    elif args.loss_type in ("dapo", "cispo"):  # its count is that of the generation batch of all processes
        divisor = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
        divisor = divisor * (parts / args.steps_per_generation if training else 1)
    weights = inputs.get("importance_sampling_ratio")  # (B, T) or (B, 1)
    values = {
        "old_logps": inputs.get("old_per_token_logps"),
        "reward_advantages": inputs["advantages"],
        "response_mask": mask,
        "importance_weights": None if weights is None else weights.expand(mask.shape),
        "divisor": divisor,
    }
    if trainer.beta:
        values |= {"ref_logps": inputs["ref_per_token_logps"], "beta": trainer.beta}
    if "costs" in inputs:
        values |= {name: inputs[name] for name in ("costs", "cost_advantages")}
        values |= {"lam": trainer.lam, "cost_limit": args.cost_limit}
    return values


def _cast(hidden: Tensor, to_fp32: bool) -> Tensor:
    """Cast hidden states to the dtype in which TRL's head would take them."""
    if to_fp32:
        return hidden.float()
    kind = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else hidden


def metrics(stats: LossStats, with_kl: bool, with_entropy: bool) -> dict[str, float]:
    """Return what GRPOTrainer logs of a loss, under its names; stats: of all processes."""
    tokens = stats.tokens.clamp_min(1)
    values = {
        "clip_ratio/low_mean": (stats.clipped_low_safe + stats.clipped_low_unsafe) / tokens,
        "clip_ratio/high_mean": (stats.clipped_high_safe + stats.clipped_high_unsafe) / tokens,
        "clip_ratio/region_mean": stats.clip_fraction,
    }
    if with_kl:
        values["kl"] = stats.kl_ref
    if with_entropy:
        values["entropy"] = stats.entropy
    return {name: value.item() for name, value in values.items()}
