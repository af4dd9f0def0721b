"""Time several ways of doing one thing turn by turn in one process, so that their ratios can be trusted."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSHED = 256 * 2**20  # bytes: more than the L2 of any GPU


@dataclass(frozen=True)
class Timing:
    """Seconds: median, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float


def summary(values: list[float]) -> Timing:
    """Return median and quartiles of the seconds of all rounds."""
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def clocked(call: Callable[[], object]) -> float:
    """Return the seconds of one call: wall time, or on CUDA the time between two events, starting with a cold L2."""
    if torch.cuda.is_available():
        return _between_events(call)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _between_events(call: Callable[[], object]) -> float:
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    flush.zero_()  # while it runs, the host launches what is timed
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


class Turns:
    """Time the candidates of a case once each per round: the others in an order drawn anew, then the subject.

    seconds: by name, of every round, warm-up rounds included.
    """

    def __init__(self, candidates: Mapping[str, Callable[[], object]], subject: str) -> None:
        self.candidates, self.subject = dict(candidates), subject
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self._others, self._draw = [name for name in candidates if name != subject], random.Random(0)

    def time_others(self) -> None:
        """Time every candidate but the subject: the first part of a round."""
        for name in self._draw.sample(self._others, len(self._others)):
            self.seconds[name].append(clocked(self.candidates[name]))

    def time_subject(self) -> None:
        """Time the subject: the second part of a round."""
        self.seconds[self.subject].append(clocked(self.candidates[self.subject]))
