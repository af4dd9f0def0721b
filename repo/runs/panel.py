"""Safety panel: show how safe the last steps were, and warn if a safe mean cost hides unsafe prompts."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel

from ..scoring.safety import compensation_sentence, summarize

WINDOW = 8
"""Number of last steps that the panel covers."""
FEWEST = 4
"""Fewest steps after which the panel warns of compensation."""


class SafetyPanel:
    """Shows mean cost, E{C-d}+, shares of unsafe responses and prompts, and compensation gap of the last WINDOW steps.

    console: where its warning is printed. limit: the cost limit d.
    """

    def __init__(self, console: Console, limit: float) -> None:
        self.console, self.limit = console, limit
        self.steps: deque[list[tuple[str, float, float]]] = deque(maxlen=WINDOW)
        # the live display's thread reads only these two, each of which is replaced as a whole
        self.summary: dict[str, float] = {}
        self.sentence: str | None = None

    def add(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Add a step's records of samples.jsonl, and print the sentence on compensation when it becomes true."""
        self.steps.append([(s["id"], s["reward"], s["cost"]) for s in samples])
        self.summary = self._summarize()
        previous, self.sentence = self.sentence, None
        if len(self.steps) >= FEWEST:
            mean, unsafe = self.summary["cost_mean"], self.summary["prompts_mostly_unsafe"]
            self.sentence = compensation_sentence(mean, self.limit, unsafe)
        if self.sentence and not previous:
            self.console.print(f"{self.sentence} in the last {len(self.steps)} steps", style="yellow", highlight=False)

    def _summarize(self) -> dict[str, float]:
        """Summarise all responses of the window; a prompt that came in two steps counts as two prompts."""
        rows = [(step, *row) for step, rows in enumerate(self.steps) for row in rows]
        index: dict[tuple[int, str], int] = {}
        group = torch.tensor([index.setdefault((step, name), len(index)) for step, name, _, _ in rows])
        rewards, costs = (torch.tensor([row[i] for row in rows]) for i in (2, 3))
        return summarize(rewards, costs, group, self.limit)

    def __rich__(self) -> Panel | str:
        """Render the panel for a live display; "" before the first step."""
        summary, sentence = self.summary, self.sentence
        if not summary:
            return ""
        text = (
            f"mean cost {summary['cost_mean']:+.3f} (limit {self.limit:g})   "
            f"E{{C-d}}+ {summary['rectified_cost']:.3f}   "
            f"unsafe: {1 - summary['safe_rate']:.0%} of responses, {summary['prompts_mostly_unsafe']:.0%} of prompts   "
            f"compensation gap {summary['compensation_gap']:.3f}"
        )
        if sentence:
            text += f"\n[bold yellow]{sentence}[/]"
        return Panel(text, title=f"last {len(self.steps)} steps", title_align="left", expand=False)
