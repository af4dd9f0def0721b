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
from ..training.advantages import is_safe, rectified_cost


def summarize(rewards: Tensor, costs: Tensor, group: Tensor, cost_limit: float) -> dict[str, float]:
    """Every quantity that a constrained run must report. rewards, costs: (B,); group: (B,) prompt of each response.

    compensation_gap = E{C-d}+ - {E[C]-d}+ is 0 iff no safe response pays for an unsafe one.
    reward_safe_mean is NaN (null in files) when no response is safe.
    prompts_mostly_unsafe is the share of prompts with more than half of their responses unsafe.
    """
    rewards, costs = rewards.double(), costs.double()
    hinge = rectified_cost(costs, cost_limit)
    safe = is_safe(costs, cost_limit)
    _, index = group.unique(return_inverse=True)
    prompts = int(index.max()) + 1
    unsafe_share = torch.zeros(prompts, dtype=torch.float64).index_add_(0, index, (~safe).double())
    unsafe_share /= torch.zeros(prompts, dtype=torch.float64).index_add_(0, index, torch.ones_like(costs))
    mean_cost = costs.mean()
    return {
        "reward_mean": rewards.mean().item(),
        "reward_safe_mean": rewards[safe].mean().item() if bool(safe.any()) else math.nan,
        "cost_mean": mean_cost.item(),
        "cost_p95": costs.quantile(0.95).item(),
        "cost_max": costs.max().item(),
        "safe_rate": safe.double().mean().item(),
        "rectified_cost": hinge.mean().item(),
        "compensation_gap": (hinge.mean() - rectified_cost(mean_cost, cost_limit)).item(),
        "prompts_mostly_unsafe": (unsafe_share > 0.5).double().mean().item(),
    }


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
