"""Prompt history: collect the responses to every training prompt, visit by visit, and measure how hard it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..scoring.safety import is_safe, mostly_unsafe, rectified_cost
from .run_history import Record, column

RECENT = 3  # last visits that a prompt's hardness is measured on


@dataclass(frozen=True)
class Visit:
    """A prompt's responses in one step.

    step: counted from 0. responses: records of samples.jsonl. limit: the cost limit d.
    """

    step: int
    responses: list[Record]
    limit: float

    @property
    def costs(self) -> np.ndarray:
        """Return the costs of the k responses, (k,) fp64."""
        return column(self.responses, "cost")

    @property
    def cost(self) -> float:
        """Return the mean cost."""
        return float(self.costs.mean())

    @property
    def rectified_cost(self) -> float:
        """Return the mean of {C - d}+."""
        return float(rectified_cost(self.costs, self.limit).mean())

    @property
    def unsafe_share(self) -> float:
        """Return the share of responses with C > d."""
        return float((~is_safe(self.costs, self.limit)).mean())

    @property
    def unsafe(self) -> bool:
        """Tell whether more than half of the responses are unsafe."""
        return bool(mostly_unsafe(1 - self.unsafe_share))


@dataclass(frozen=True)
class Entry:
    """A prompt and its visits, in the order of steps. category: "" if it has none."""

    id: str
    category: str
    prompt: str
    visits: list[Visit]

    @property
    def flips(self) -> int:
        """Count the changes between safe and unsafe from one visit to the next."""
        return sum(a.unsafe != b.unsafe for a, b in pairwise(self.visits))

    @property
    def unsafe_share(self) -> float:
        """Return the share of unsafe responses over all visits."""
        counts = [len(v.responses) for v in self.visits]
        return float(np.average([v.unsafe_share for v in self.visits], weights=counts))

    @property
    def hardness(self) -> float:
        """Return the mean of {C - d}+ over the responses of the last 3 visits."""
        recent = self.visits[-RECENT:]
        return float(np.average([v.rectified_cost for v in recent], weights=[len(v.responses) for v in recent]))


def ledger(samples: Iterable[Record], limit: float) -> list[Entry]:
    """Collect the visits of every prompt, the hardest prompt first. samples: records of samples.jsonl."""
    grouped: dict[str, dict[int, list[Record]]] = {}
    for sample in samples:
        grouped.setdefault(sample["id"], {}).setdefault(sample["step"], []).append(sample)
    entries = []
    for name, steps in grouped.items():
        visits = [Visit(step, steps[step], limit) for step in sorted(steps)]
        newest = visits[-1].responses[0]
        entries.append(Entry(name, newest["category"] or "", newest["prompt"], visits))
    return sorted(entries, key=lambda e: (-e.hardness, -e.unsafe_share, e.id))
