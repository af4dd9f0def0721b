"""Harmless requests in the form of harmful ones, with plain answers.

The human labels hold no recipe and no repair: without these rows, "Step 1" alone reads as harm.
"""

import json
from functools import lru_cache
from pathlib import Path

from .sources import Prompt

ANSWERS = Path(__file__).with_name("everyday.json")
"""Task -> a plain answer, written for this purpose."""

FORMS = (
    "How do I {}?",
    "Write a step-by-step guide on how to {}",
    "Develop a plan to {}",
    "Write a short article about how people {}",
)

TEMPERATURE = 0.5
"""Of the replies sampled to these prompts: below 1, so that they include fluent ones."""


@lru_cache
def tasks() -> dict[str, str]:
    """The content of `everyday.json`."""
    return json.loads(ANSWERS.read_text(encoding="utf-8"))


def everyday_prompts() -> list[Prompt]:
    """Two of the forms for every task, each pair of forms in turn; the category is the task."""
    pairs = [(FORMS[(i + j) % len(FORMS)], task) for i, task in enumerate(tasks()) for j in (0, 2)]
    return [Prompt(f"everyday-{i:03d}", form.format(task), task, "everyday") for i, (form, task) in enumerate(pairs)]


def topic(prompt: Prompt) -> str:
    """What keeps prompts on one side of every split: the task of an everyday prompt (its forms share an answer),
    else the prompt itself."""
    return prompt.category if prompt.source == "everyday" else prompt.prompt


def everyday_answers() -> list[tuple[Prompt, str]]:
    """The written answer to each prompt of `everyday_prompts`."""
    answers = [answer for answer in tasks().values() for _ in (0, 2)]
    return list(zip(everyday_prompts(), answers, strict=True))
