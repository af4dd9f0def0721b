"""Panel: how safe the last steps were, live under the progress bar, and whether the mean hides unsafe prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel

from ..scoring.safety import compensation_sentence, summarize

WINDOW = 8
"""Steps that the panel looks back on."""
FEWEST = 4
"""Steps that the sentence takes."""


class SafetyPanel:
    """Mean cost, E{C-d}+, share of unsafe responses and prompts, and compensation gap of the last WINDOW steps."""

    def __init__(self, console: Console, limit: float) -> None:
        self.console, self.limit = console, limit
        self.steps: deque[list[tuple[str, float, float]]] = deque(maxlen=WINDOW)
        self.summary: dict[str, float] = {}  # the display's thread reads this and the sentence only
        self.sentence: str | None = None

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """A step's records of samples.jsonl. Prints the sentence when it begins to be true."""
        self.steps.append([(s["id"], s["reward"], s["cost"]) for s in samples])
        self.summary = self._summarize()
        said, self.sentence = self.sentence, None
        if len(self.steps) >= FEWEST:
            mean, unsafe = self.summary["cost_mean"], self.summary["prompts_mostly_unsafe"]
            self.sentence = compensation_sentence(mean, self.limit, unsafe)
        if self.sentence and not said:
            self.console.print(f"{self.sentence} in the last {len(self.steps)} steps", style="yellow", highlight=False)

    def _summarize(self) -> dict[str, float]:
        """Of all responses of the window; a prompt that came twice counts as two."""
        rows = [(step, *row) for step, rows in enumerate(self.steps) for row in rows]
        index: dict[tuple[int, str], int] = {}
        group = torch.tensor([index.setdefault((step, name), len(index)) for step, name, _, _ in rows])
        rewards, costs = (torch.tensor([row[i] for row in rows]) for i in (2, 3))
        return summarize(rewards, costs, group, self.limit)

    def __rich__(self) -> Panel | str:
        """For a live display."""
        summary, sentence = self.summary, self.sentence
        if not summary:
            return ""
        text = (
            f"mean cost {summary['cost_mean']:+.3f} (limit {self.limit:g})   E{{C-d}}+ {summary['rectified_cost']:.3f}   "
            f"unsafe: {1 - summary['safe_rate']:.0%} of responses, {summary['prompts_mostly_unsafe']:.0%} of prompts   "
            f"compensation gap {summary['compensation_gap']:.3f}"
        )
        if sentence:
            text += f"\n[bold yellow]{sentence}[/]"
        return Panel(text, title=f"last {len(self.steps)} steps", title_align="left", expand=False)
