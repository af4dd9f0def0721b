"""Prompts, supervised examples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jsonargparse.typing import NonNegativeFloat, PositiveInt


@dataclass(frozen=True)
class DataConfig:
    """The prompts of training and evaluation."""

    train: str = "embedded"
    """Training prompts: a JSON lines (also .xz or .gz), csv or parquet file, or a Hugging Face dataset (folder or hub
    name, with #split or #config/split; else the split "train"). "embedded": the prompts of the assets folder, of
    which #train, #valid and #eval name the splits. A record has `prompt` (a text, or a conversation as a list of role
    and content) or `messages`, and optionally `id` and `category`. Scorer functions get the columns that they name.
    Methods cdpo and repo_dpo learn from the pairs in the columns `response_0` and `response_1`; where records have
    neither, from pairs that they sample from the reference."""
    eval: str = "embedded"
    """Held-out prompts, given like data.train; without #split the split "test" is read. Training prompts that are held
    out too are dropped."""
    column: str = "prompt"
    """Name of the column that holds the prompt; in records where it is null or missing, `messages` is read. A column
    that no record has is an error."""
    system_prompt: str | None = None
    """System message to put before every prompt that has none. null: add none; the chat template may add its own."""
    max_prompt_tokens: PositiveInt = 256
    """Limit of a prompt's length in tokens, chat template included; longer prompts are dropped and counted."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Variables for the policy's chat template, e.g. {enable_thinking: false}; one that it does not use is an error."""
    date: str | None = None
    """Today's date, YYYY-MM-DD, for chat templates that print it. null: the day on which the run begins, which its
    config.yaml keeps, so that a run resumed or evaluated later has the same prompts."""


@dataclass(frozen=True)
class PtxConfig:
    """Supervised examples that are trained on in the same optimiser steps, against forgetting."""

    data: str | None = None
    """Examples, given like data.train; a record also has a `response`, or its `messages` end with the assistant's.
    null: no examples."""
    coef: NonNegativeFloat = 16.0
    """Weight of the examples' cross-entropy in nats per token; the policy loss has weight 1."""
