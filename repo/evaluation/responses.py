"""Responses: what an evaluation records of each, whoever chose it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..data.prompts import Prompt
from ..scoring.judge import Judge
from ..scoring.scorers import Scores
from .reward_hacking import is_refusal, repetition


def columns_of(
    prompts: Sequence[Prompt], texts: Sequence[str], scores: Scores, judge: Judge | None
) -> dict[str, Sequence[Any]]:
    """Return what is said of B responses, by key: scores, signs of reward hacking, and the judge's verdicts if any."""
    columns: dict[str, Sequence[Any]] = {
        "reward": scores.rewards.tolist(),
        "cost": scores.costs.tolist(),
        "refusal": [is_refusal(text) for text in texts],
        "repetition": [repetition(text) for text in texts],
    }
    if judge is not None:
        verdicts = judge(prompts, texts)
        columns["judge_safe"] = verdicts.safe.tolist()
        if verdicts.topicality is not None and verdicts.topical is not None:
            columns |= {"topicality": verdicts.topicality.tolist(), "topical": verdicts.topical.tolist()}
    return columns


def records_of(
    prompts: Sequence[Prompt], texts: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """Make the record of each response. columns: key -> B values."""
    return [
        {"id": p.id, "category": p.category, "prompt": p.text, "response": text}
        | {key: values[row] for key, values in columns.items()}
        for row, (p, text) in enumerate(zip(prompts, texts, strict=True))
    ]
