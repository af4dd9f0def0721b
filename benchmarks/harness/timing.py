"""Time several ways of doing one thing turn by turn in one process, so that their ratios can be trusted."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

FLUSHED = 256 * 2**20  # bytes: more than the L2 of any GPU
LONGEST_LEAD = 0.03  # seconds


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


def clocked(call: Callable[[], object], lead: float = 0.0) -> float:
    """Return the seconds of one call: wall time, or on CUDA the time between two events, starting with a cold L2.

    lead: seconds by which the host is ahead of a CUDA device when the call begins, so that it is the device that is
    timed and not the host's launches.
    """
    if torch.cuda.is_available():
        return _between_events(call, lead)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _between_events(call: Callable[[], object], lead: float) -> float:
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if lead:
        torch.cuda._sleep(int(lead * _cycles_per_second()))
    flush.zero_()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


@functools.cache
def _cycles_per_second() -> float:
    """Return how many cycles torch.cuda._sleep takes for a second."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    first.record()
    torch.cuda._sleep(cycles)
    last.record()
    torch.cuda.synchronize()
    return cycles / (first.elapsed_time(last) / 1e3)


def host_seconds(call: Callable[[], object]) -> float:
    """Return how long the host takes to launch a call that was made before."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    elapsed = time.perf_counter() - start
    torch.cuda.synchronize()
    return elapsed


class Turns:
    """Time the candidates of a case once each per round: the others in an order drawn anew, then the subject.

    resets: by name, called before a candidate, untimed. clock: takes a call and the lead that it needs.
    seconds: by name, of every round, warm-up rounds included.
    """

    def __init__(
        self,
        candidates: Mapping[str, Callable[[], object]],
        subject: str,
        resets: Mapping[str, Callable[[], None]] | None = None,
        clock: Callable[[Callable[[], object], float], float] | None = None,
    ) -> None:
        self.candidates, self.subject = dict(candidates), subject
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self._others, self._draw = [name for name in candidates if name != subject], random.Random(0)
        self._resets, self._clock, self._leads = dict(resets or {}), clock, dict[str, float]()

    def time_others(self) -> None:
        """Time every candidate but the subject: the first part of a round."""
        for name in self._draw.sample(self._others, len(self._others)):
            self._time(name)

    def time_subject(self) -> None:
        """Time the subject: the second part of a round."""
        if self.subject in self.candidates:
            self._time(self.subject)

    def _time(self, name: str) -> None:
        call, reset = self.candidates[name], self._resets.get(name, lambda: None)
        reset()
        if torch.cuda.is_available() and name not in self._leads:
            call()
            reset()
            self._leads[name] = min(2 * host_seconds(call), LONGEST_LEAD)
            reset()
        self.seconds[name].append((self._clock or clocked)(call, self._leads.get(name, 0.0)))
