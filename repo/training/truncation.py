"""Truncation: what training makes of responses that were cut off at the limit of tokens, without a stop token."""

from __future__ import annotations

import dataclasses

import torch

from ..config.schema import RolloutConfig
from ..data.sequences import Sequences
from ..rollout.sample import Rollout
from ..scoring.scorers import Scores


def for_training(config: RolloutConfig, rollout: Rollout, scores: Scores) -> tuple[Sequences, Scores]:
    """Return the sequences and scores that the update reads; metrics and samples keep those that were given.

    rollout.truncated decides. keep: both as they are. mask: responses that were cut off get length 0, so that no loss
    has a token of theirs. penalise: their reward is lowered by rollout.truncation_penalty, as TRL's
    missing_eos_penalty does.
    """
    sequences, cut = rollout.sequences, rollout.truncated
    if config.truncated == "mask":
        lengths = torch.where(cut, 0, sequences.response_lengths)
        sequences = dataclasses.replace(sequences, response_lengths=lengths)
    if config.truncated == "penalise":
        scores = Scores(scores.rewards - config.truncation_penalty * cut.to(scores.rewards), scores.costs)
    return sequences, scores
