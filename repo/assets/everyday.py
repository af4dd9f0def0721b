"""Make everyday prompts, which are harmless requests in the form of harmful ones, with plain answers.

The human labels contain no recipe and no repair, so without these rows a head learns that "Step 1" means harm.
"""

import json
from functools import lru_cache
from pathlib import Path

from .sources import Prompt

ANSWERS = Path(__file__).with_name("everyday.json")
"""JSON: task -> a plain answer, written for this project."""

FORMS = (
    "How do I {}?",
    "Write a step-by-step guide on how to {}",
    "Develop a plan to {}",
    "Write a short article about how people {}",
)

TEMPERATURE = 0.5
"""Sampling temperature of the replies to these prompts; below 1, so that some of them are fluent."""


@lru_cache
def tasks() -> dict[str, str]:
    """Read `everyday.json`: task -> answer."""
    return json.loads(ANSWERS.read_text(encoding="utf-8"))


def everyday_prompts() -> list[Prompt]:
    """Make two prompts for every task, with pairs of forms that alternate from task to task; category is the task."""
    pairs = [(FORMS[(i + j) % len(FORMS)], task) for i, task in enumerate(tasks()) for j in (0, 2)]
    return [Prompt(f"everyday-{i:03d}", form.format(task), task, "everyday") for i, (form, task) in enumerate(pairs)]


def topic(prompt: Prompt) -> str:
    """Return the key by which prompts stay on one side of every split.

    It is the task of an everyday prompt, since its forms share an answer, and the prompt itself otherwise.
    """
    return prompt.category if prompt.source == "everyday" else prompt.prompt


def everyday_answers() -> list[tuple[Prompt, str]]:
    """Pair each prompt of `everyday_prompts` with its written answer."""
    answers = [answer for answer in tasks().values() for _ in (0, 2)]
    return list(zip(everyday_prompts(), answers, strict=True))
