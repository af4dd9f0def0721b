"""Pairs: the two responses to each prompt that a step learns from, given by the data or sampled from the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..config.schema import Config
from ..data.pairs import texts_of
from ..data.prompts import Prompt
from ..models.policy import Policy
from .sample import Rollout, make_rollout, sample


def draw_pairs(
    reference: Policy, prompts: Sequence[Prompt], config: Config, step: int, part: range | None = None
) -> Rollout:
    """Take the pairs of prompts that have some, or else sample two responses to each prompt from the reference.

    What is sampled depends on the run's seed, the step and the prompts alone. A resumed run therefore draws the pairs
    that it would have drawn, and none has to be kept.

    part: indices of the prompts, adjacent ones; None: all.
    Returns a rollout whose rows 2i and 2i + 1 are the pair of prompt i. The log-probabilities of given pairs are 0.
    """
    if not prompts[0].pair:
        return sample(reference, prompts, 2, config.rollout, config.seed, f"pairs {step}", part)
    mine = [prompts[i] for i in (range(len(prompts)) if part is None else part)]
    # the encoding of an answer may end the prompt earlier than the encoding that a response is sampled after
    asked = tuple(replace(p, token_ids=example.prompt_ids) for p in mine for example in p.pair)
    responses = [example.response_ids for p in mine for example in p.pair]
    texts = tuple(text for p in mine for text in texts_of(p))
    shape = len(responses), max(map(len, responses))
    group, ended = torch.arange(len(mine)).repeat_interleave(2), torch.zeros(len(responses), dtype=torch.bool)
    return make_rollout(asked, group, responses, texts, torch.zeros(shape), ended, reference.pad_id)
