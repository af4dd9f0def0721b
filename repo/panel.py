"""Panel: how safe the last steps were, live under the progress bar, and whether the mean hides unsafe prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel

from .metrics import summarize

WINDOW = 8
"""Steps that the panel looks back on."""
FEWEST = 4
"""Steps that the sentence takes."""


def compensation_sentence(mean_cost: float, limit: float, unsafe: float) -> str | None:
    """What an average hides: that its constraint is met although a share `unsafe` of prompts is not safe. None where
    the mean is above the limit, or no prompt is unsafe."""
    if mean_cost > limit or unsafe == 0:
        return None
    return f"mean constraint met (E[C] = {mean_cost:.3f} <= {limit:g}), {unsafe:.0%} of prompts unsafe"


class SafetyPanel:
    """Mean cost, E{C-d}+, share of unsafe responses and prompts, and compensation gap of the last WINDOW steps."""

    def __init__(self, console: Console, limit: float) -> None:
        self.console, self.limit = console, limit
        self.steps: deque[Sequence[Mapping[str, Any]]] = deque(maxlen=WINDOW)
        self.said = False

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A step's records of samples.jsonl. Prints the sentence when it begins to be true."""
        self.steps.append(samples)
        sentence = self.sentence
        if sentence and not self.said:
            self.console.print(f"{sentence} in the last {len(self.steps)} steps", style="yellow", highlight=False)
        self.said = sentence is not None

    @property
    def figures(self) -> dict[str, float]:
        """What summarize() finds in the last steps; a prompt that came twice counts as two."""
        rows = [(step, s) for step, samples in enumerate(self.steps) for s in samples]
        index: dict[tuple[int, str], int] = {}
        group = torch.tensor([index.setdefault((step, s["id"]), len(index)) for step, s in rows])
        rewards, costs = (torch.tensor([s[key] for _, s in rows]) for key in ("reward", "cost"))
        return summarize(rewards, costs, group, self.limit)

    @property
    def sentence(self) -> str | None:
        """compensation_sentence of the last steps, None before there are enough."""
        if len(self.steps) < FEWEST:
            return None
        found = self.figures
        return compensation_sentence(found["cost_mean"], self.limit, found["prompts_mostly_unsafe"])

    def __rich__(self) -> Panel | str:
        """For a live display."""
        if not self.steps:
            return ""
        found = self.figures
        text = (
            f"mean cost {found['cost_mean']:+.3f} (limit {self.limit:g})   E{{C-d}}+ {found['rectified_cost']:.3f}   "
            f"unsafe: {1 - found['safe_rate']:.0%} of responses, {found['prompts_mostly_unsafe']:.0%} of prompts   "
            f"compensation gap {found['compensation_gap']:.3f}"
        )
        if self.sentence:
            text += f"\n[bold yellow]{self.sentence}[/]"
        return Panel(text, title=f"last {len(self.steps)} steps", title_align="left", expand=False)
