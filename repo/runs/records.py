"""Records: the lines that a step adds to metrics.jsonl and samples.jsonl, and a timer of its phases."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repo_kernels.pairs import pair_loss

from ..config.schema import AlgorithmConfig
from ..models.critic import explained_variance
from ..rollout.sample import Rollout
from ..scoring.safety import SUMMARY, is_safe, summarize
from ..scoring.scorers import Scores
from ..training.advantages import Advantages, loss_mode, on_unsafe, penalised_cost
from ..training.batch import Batch
from ..training.mismatch import Agreement
from ..training.pairs import PairBatch, PairResult
from ..training.update import UpdateResult


def step_record(
    step: int,
    algorithm: AlgorithmConfig,
    rollout: Rollout,
    scores: Scores,
    batch: Batch,
    result: UpdateResult,
    agreed: Agreement,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Make the line of metrics.jsonl for a step.

    step: counted from 0.
    batch: its lam and beta are those that the step used.
    agreed: agreement of rollout and trainer.
    seconds: duration of each phase, including "rollout" and "update".
    """
    stats, mask = result.stats, batch.sequences.response_mask
    returns = batch.advantages.returns
    return {
        "step": step,
        **summarize(scores.rewards, scores.costs, rollout.group, algorithm.cost_limit),
        "lam": batch.lam,
        "beta": batch.beta,
        "reward_cost_grad_ratio": reward_cost_grad_ratio(algorithm, batch),
        "kl": stats.kl_ref.item(),
        "entropy": stats.entropy.item(),
        "clip_frac": stats.clip_fraction.item(),
        "ratio_max": stats.ratio_max.item(),
        "effective_sample_size": stats.effective_sample_size.item(),
        "rollout_gap": agreed.gap,
        "rollout_ess": agreed.ess,
        **result.losses,
        **{f"{s}_explained_variance": explained_variance(v, returns[s], mask) for s, v in batch.values.items()},
        **credit_record(algorithm, batch),
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "skipped": result.skipped,
        "response_tokens": rollout.tokens,
        "length": rollout.tokens / len(rollout.texts),
        "truncated": rollout.truncated.double().mean().item(),
        "tokens_per_second": rollout.tokens / seconds["rollout"],
        "update_tokens_per_second": int((rollout.sequences.attention_mask).sum()) / seconds["update"],
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


def credit_record(algorithm: AlgorithmConfig, batch: Batch) -> dict[str, float]:
    """Return `credit_explained_variance`: the part of the penalised cost's variance that the tokens' shares explain.

    1: the shares of each response add up to its cost, but for a constant. {} without learned credit.
    """
    if batch.shares is None:
        return {}
    limit = algorithm.cost_limit if batch.cost_limit is None else batch.cost_limit
    penalised, counted = penalised_cost(algorithm, batch.costs, limit), batch.sequences.response_lengths > 0
    return {"credit_explained_variance": explained_variance(batch.shares.sum(1), penalised, counted)}


def reward_cost_grad_ratio(algorithm: AlgorithmConfig, batch: Batch) -> float:
    """Compute |d L_reward / d logps| / |d L_cost / d logps|, where L_cost includes the factor lambda.

    The norms are L2 over the batch's response tokens. Both are evaluated at the sampling policy, where the surrogate's
    derivative is -w_t A_t; KL, clipping and scale_by_std are left out. Returns NaN if the method has no cost term or
    its norm is 0.
    """
    reward, cost = batch.advantages.reward, batch.advantages.cost
    if cost is None or loss_mode(algorithm) is None:
        return math.nan
    if loss_mode(algorithm) == "split":
        limit = algorithm.cost_limit if batch.cost_limit is None else batch.cost_limit
        cost = on_unsafe(cost, batch.costs, limit)
    lengths, mask = batch.sequences.response_lengths, batch.sequences.response_mask
    weights = 1 / lengths.clamp_min(1) if algorithm.loss_agg_mode == "seq-mean-token-mean" else lengths.clamp_max(1)

    def norm(advantages: Tensor) -> float:
        per_token = advantages if advantages.ndim == 2 else advantages[:, None]
        return ((per_token * weights[:, None]).double().square() * mask).sum().sqrt().item()

    divisor = batch.lam * norm(cost)
    return norm(reward) / divisor if divisor else math.nan


@dataclass(frozen=True)
class Measured:
    """What was measured of a policy that learns from responses of others: B responses of its own, and their scores.

    kl: mean of exp(-delta) + delta - 1 over their tokens, delta = log policy - log reference: an estimate of
    KL(policy || reference) in nats per token.
    """

    rollout: Rollout
    scores: Scores
    kl: float

    @classmethod
    def of(cls, rollout: Rollout, scores: Scores, ref_logps: Tensor) -> Measured:
        """Summarise sampled responses. ref_logps: (B, R) the reference's log-probabilities in nats."""
        delta = (rollout.logps - ref_logps)[rollout.sequences.response_mask].double().clamp(-20, 20)
        return cls(rollout, scores, (torch.exp(-delta) + delta - 1).mean().item())


def pair_record(
    step: int,
    algorithm: AlgorithmConfig,
    batch: PairBatch,
    result: PairResult,
    measured: Measured | None,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Make the line of metrics.jsonl for a step that learned from pairs.

    Rewards, costs, kl and lengths are those of the policy's own responses, NaN in steps that sampled none.

    step: counted from 0. measured: None if the step sampled no response of the policy. seconds: duration of each phase,
    including "update".
    """
    out = pair_loss(result.log_ratios, batch.labels, algorithm.beta)
    tokens = int(batch.sequences.response_lengths.sum())
    if measured is None:
        policy = dict.fromkeys((*SUMMARY, "kl", "length", "truncated"), math.nan)
    else:
        rollout, scores = measured.rollout, measured.scores
        policy = {
            **summarize(scores.rewards, scores.costs, rollout.group, algorithm.cost_limit),
            "kl": measured.kl,
            "length": rollout.tokens / len(rollout.texts),
            "truncated": rollout.truncated.double().mean().item(),
        }
    return {
        "step": step,
        **policy,
        "lam": batch.lam,
        "beta": algorithm.beta,
        "loss": result.loss,
        "pair_accuracy": out.correct.mean().item(),
        "pair_margin": out.margins.mean().item(),
        "pair_confidence": torch.maximum(batch.labels, 1 - batch.labels).mean().item(),
        "pair_log_ratio": result.log_ratios.mean().item(),
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "skipped": result.skipped,
        "pair_tokens": tokens,
        "update_tokens_per_second": int(batch.sequences.attention_mask.sum()) / seconds["update"],
        **{f"seconds_{name}": value for name, value in seconds.items()},
    }


def sample_records(
    step: int,
    rollout: Rollout,
    scores: Scores,
    advantages: Advantages | None,
    limit: float,
    costliest: Sequence[list[Any]] = (),
) -> list[dict]:
    """Make the lines of samples.jsonl for a step, one per response.

    step: counted from 0. advantages: per-token ones are averaged over the response; None for responses that nothing is
    learned from. limit: the cost limit d. costliest: for each response the tokens with the largest shares of its cost,
    if credit is learned.
    """
    mean = torch.full_like(scores.rewards, math.nan) if advantages is None else advantages.combined
    if mean.ndim == 2:
        mean = mean.sum(1) / rollout.sequences.response_lengths.clamp_min(1)
    columns = scores.rewards, scores.costs, is_safe(scores.costs, limit), mean, rollout.truncated
    rows = zip(rollout.prompts, rollout.texts, *(c.tolist() for c in columns), strict=True)
    lists = [{"costliest": tokens} for tokens in costliest] or [{}] * len(rollout.texts)
    return [
        {
            "step": step,
            "id": prompt.id,
            "category": prompt.category,
            "prompt": prompt.text,
            "response": text,
            "reward": reward,
            "cost": cost,
            "safe": safe,
            "advantage": advantage,
            "truncated": truncated,
            **listed,
        }
        for (prompt, text, reward, cost, safe, advantage, truncated), listed in zip(rows, lists, strict=True)
    ]


class Timer:
    """Measures how long the phases of a step take. seconds: duration of each phase, by name."""

    def __init__(self) -> None:
        self.last, self.seconds = time.perf_counter(), dict[str, float]()

    def mark(self, name: str) -> None:
        """End the phase `name`, which began at the previous mark."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
