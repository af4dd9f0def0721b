"""Console: the display of a run while it trains."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..config.schema import DUAL_EVERY, Config
from .obstacles import obstacles
from .panel import WINDOW, SafetyPanel

COLUMNS = {
    "step": ("step", "{:>4d}"),
    "reward_mean": ("reward", "{:>7.3f}"),
    "cost_mean": ("cost", "{:>7.3f}"),
    "safe_rate": ("safe", "{:>5.0%}"),
    "rectified_cost": ("E{C-d}+", "{:>7.3f}"),
    "compensation_gap": ("gap", "{:>6.3f}"),
    "lam": ("lambda", "{:>6.3f}"),
    "kl": ("kl", "{:>7.4f}"),
    "entropy": ("entropy", "{:>7.3f}"),
    "clip_frac": ("clip", "{:>5.1%}"),
    "tokens_per_second": ("tok/s", "{:>6.1f}"),
}


PAIR_COLUMNS = {
    "step": COLUMNS["step"],
    "loss": ("loss", "{:>7.4f}"),
    "pair_accuracy": ("right", "{:>5.0%}"),
    "pair_margin": ("margin", "{:>7.3f}"),
    **{key: COLUMNS[key] for key in ("reward_mean", "cost_mean", "safe_rate", "rectified_cost")},
    **{key: COLUMNS[key] for key in ("compensation_gap", "lam", "kl")},
}
"""Columns of methods that learn from pairs."""


class ConsoleTable:
    """Prints one line per step, under a header that is repeated every 20 lines.

    columns: key of the metrics -> (title, format); "-" stands for what is not known.
    """

    def __init__(self, console: Console, columns: Mapping[str, tuple[str, str]] = COLUMNS) -> None:
        self.console, self.columns, self.lines = console, columns, 0

    def row(self, record: Mapping[str, Any], suffix: str = "") -> None:
        """Print the line of a step, counted from 1. record: its metrics. suffix: text at the end of the line."""
        record = {**record, "step": record["step"] + 1}
        cells = {title: _cell(record[key], form) for key, (title, form) in self.columns.items()}
        if self.lines % 20 == 0:
            titles = (title.rjust(len(cell)) for title, cell in cells.items())
            self.console.print("  ".join(titles), style="bold", highlight=False)
        self.lines += 1
        self.console.print("  ".join(cells.values()) + f"  {suffix}", highlight=False)


def _cell(value: float, form: str) -> str:
    return "-".rjust(len(form.format(0.0))) if math.isnan(value) else form.format(value)


class _ProgressAbove(Progress):
    """A progress bar with another live display below it."""

    below: RenderableType = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from (*super().get_renderables(), self.below)


def progress_bar(console: Console, below: RenderableType = "") -> Progress:
    """Make a progress bar with steps done, elapsed and remaining time, shown on terminals only.

    below: another live display under the bar.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    bar = _ProgressAbove(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar.below = below
    return bar


def show_samples(console: Console, samples: Sequence[Mapping[str, Any]]) -> None:
    """Print prompts and responses with their scores. samples: records of samples.jsonl."""
    for s in samples:
        mark = "safe" if s["safe"] else "UNSAFE"
        console.print(
            f"    [{mark}] reward {s['reward']:.2f} cost {s['cost']:.2f}"
            + ("" if math.isnan(s["advantage"]) else f" advantage {s['advantage']:.2f}"),
            style="green" if s["safe"] else "red",
            highlight=False,
            markup=False,
        )
        if tokens := s.get("costliest"):
            listed = ", ".join(f"{text!r} {share:.2f}" for text, share in tokens)
            console.print(f"      cost by token: {listed}", style="dim", highlight=False, markup=False)
        prompt, response = (" ".join(s[k].split())[:160] for k in ("prompt", "response"))
        console.print(f"      > {prompt}\n      < {response}", style="dim", highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Format seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Display:
    """The training display: a line per step with its ETA, the safety panel, samples, warnings and a progress bar."""

    def __init__(self, console: Console, config: Config, first: int) -> None:
        """Make the display of a run. first: the step that training begins with, counted from 0."""
        self.console, self.config, self.first = console, config, first
        self.table = ConsoleTable(console, PAIR_COLUMNS if config.algorithm.on_pairs else COLUMNS)
        self.panel = SafetyPanel(console, config.algorithm.cost_limit)
        self.bar, self.started, self.warned = progress_bar(console, self.panel), time.perf_counter(), False
        self.settings, self.told = asdict(config), set[str]()
        steps = WINDOW * DUAL_EVERY if config.algorithm.on_pairs else WINDOW  # of those on pairs WINDOW sample
        self.recent: deque[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]] = deque(maxlen=steps)

    def __enter__(self) -> Display:
        self.bar.start()
        self.task = self.bar.add_task("training", total=self.config.steps, completed=self.first)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.bar.stop()
        if kind is None and not self.console.is_terminal:  # no live display has shown the panel
            self.console.print(self.panel)

    def step(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], warning: str | None) -> None:
        """Show the metrics of a step, some of its samples every sample_every steps, and each warning once.

        record, samples: the step's lines of metrics.jsonl and samples.jsonl. warning: a sentence, or None.
        """
        done = record["step"] + 1
        seconds = (time.perf_counter() - self.started) / (done - self.first) * (self.config.steps - done)
        self.table.row(record, f"eta {duration(seconds)}")
        if samples:
            self.panel.add(samples)
        if warning and not self.warned:
            self.console.print(warning, style="yellow", markup=False, highlight=False)
            self.warned = True
        self._obstacles(record, samples)
        if self.config.sample_every and done % self.config.sample_every == 0:
            show_samples(self.console, samples[:: self.config.rollout.samples_per_prompt][:2])
        self.bar.advance(self.task)

    def _obstacles(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Print each obstacle to learning, in the last WINDOW steps that sampled, when it is first found."""
        self.recent.append((record, samples))
        records = [r for r, _ in self.recent]
        found = obstacles(self.settings, records, [s for _, part in self.recent for s in part])
        for kind in found.keys() - self.told:
            self.console.print(f"note: {found[kind]}", style="yellow", markup=False, highlight=False)
        self.told |= found.keys()
