"""Timing several ways of doing one thing so that their ratios can be believed: turn by turn in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds: median, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    prepare: Callable[[], object] | None = None,
    warmups: int = 2,
) -> dict[str, Timing]:
    """Time each candidate once per round, in turn, `prepare` before each call and not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmups + rounds):
        for name, call in candidates.items():
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if turn >= warmups:
                seconds[name].append(elapsed)
    return {name: _summary(values) for name, values in seconds.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine() -> str:
    """One line: processor, threads, load average, versions."""
    name = "unknown CPU"
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    load = os.getloadavg()[0]
    return f"{name}, {torch.get_num_threads()} threads, load {load:.1f}, torch {torch.__version__}"
