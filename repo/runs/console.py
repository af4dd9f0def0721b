"""Metrics: what a batch of scored responses says about safety, and the files and lines that tell it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ..common.errors import UserError
from ..scoring.safety import is_safe, rectified_cost


class JsonLines:
    """An append-only file of JSON objects, one per line; `size` is the offset a checkpoint keeps."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        """Open for appending; with an offset, first cut the file back to it."""
        self.path = path
        if offset is not None:
            with path.open("r+b") as file:
                file.truncate(offset)
        self.file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinities become null."""
        try:
            self.file.write(json.dumps(finite(dict(record)), ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is intact") from error

    def sync(self) -> int:
        """Force the file to disk; returns its size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def finite(value: Any) -> Any:
    """The value with null for NaN and infinities, as JSON takes it."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


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


class ConsoleTable:
    """One line per step under a header that comes back every 20 lines."""

    def __init__(self, console: Console) -> None:
        self.console, self.lines = console, 0

    def row(self, record: Mapping[str, Any], suffix: str = "") -> None:
        """Print the step; `suffix` (the ETA) follows it."""
        cells = {title: form.format(record[key]) for key, (title, form) in COLUMNS.items()}
        if self.lines % 20 == 0:
            titles = (title.rjust(len(cell)) for title, cell in cells.items())
            self.console.print("  ".join(titles), style="bold", highlight=False)
        self.lines += 1
        self.console.print("  ".join(cells.values()) + f"  {suffix}", highlight=False)


class _ProgressAbove(Progress):
    """A progress bar above something else that is live."""

    below: RenderableType = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from (*super().get_renderables(), self.below)


def progress_bar(console: Console, below: RenderableType = "") -> Progress:
    """Steps done, elapsed and remaining time, above `below`; shown on terminals only."""
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
    """A few prompts and responses with their scores."""
    for s in samples:
        mark = "safe" if s["safe"] else "UNSAFE"
        console.print(
            f"    [{mark}] reward {s['reward']:.2f} cost {s['cost']:.2f} advantage {s['advantage']:.2f}",
            style="green" if s["safe"] else "red",
            highlight=False,
            markup=False,
        )
        prompt, response = (" ".join(s[k].split())[:160] for k in ("prompt", "response"))
        console.print(f"      > {prompt}\n      < {response}", style="dim", highlight=False, markup=False)


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
