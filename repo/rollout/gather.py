"""Gather: join what all processes have sampled and scored into one rollout batch, which each of them gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.distributed import World
from ..scoring.scorers import Scores
from .sample import Rollout, make_rollout


def gather(
    world: World, rollout: Rollout, scores: Scores, ref_logps: Tensor, pad_id: int
) -> tuple[Rollout, Scores, Tensor]:
    """Join the rollouts, scores and reference log-probabilities of all processes, in the order of the prompts.

    ref_logps: (b, r) of this process's b responses. pad_id: fills the padding. Every process calls it.
    Returns the whole batch; its log-probabilities are (B, R) with zeros after each response.
    """
    if world.size == 1:
        return rollout, scores, ref_logps
    rollouts, parts, logps = zip(*world.gather((rollout, scores, ref_logps)), strict=True)
    rewards, costs = (torch.cat([getattr(part, name) for part in parts]) for name in ("rewards", "costs"))
    return merge(rollouts, pad_id), Scores(rewards, costs), concatenate(logps)


def merge(rollouts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Join rollouts into one, in their order; groups are numbered on from one to the next."""
    if len(rollouts) == 1:
        return rollouts[0]
    starts = torch.tensor([0] + [int(r.group.max()) + 1 for r in rollouts]).cumsum(0)
    return make_rollout(
        tuple(prompt for r in rollouts for prompt in r.prompts),
        torch.cat([start + r.group for start, r in zip(starts, rollouts, strict=False)]),
        [response for r in rollouts for _, response in r.sequences.token_lists()],
        tuple(text for r in rollouts for text in r.texts),
        concatenate([r.logps for r in rollouts]),
        torch.cat([r.truncated for r in rollouts]),
        pad_id,
    )


def concatenate(rows: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors (b, r) of different widths along the first dimension into (B, R), zeros on the right."""
    width = max(part.shape[1] for part in rows)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in rows])
