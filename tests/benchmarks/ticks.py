"""A pytest plugin for the benchmarks: a clock on which each launch of our kernel takes TICKS ticks, and small copies.

    TICKS=2 python -m pytest -p tests.benchmarks.ticks benchmarks/bench_loss.py --quick

With it every run of the benchmarks gives the same times, and a kernel can be made slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from benchmarks.harness import limits, timing
from repo_kernels.backends import cpu

_launched = [0]
_kernels = {name: getattr(cpu, name) for name in ("fused", "whole")}  # of the linear loss, and of the loss


def counted(name: str) -> Callable[..., object]:
    def launch(*arguments, **options):
        _launched[0] += int(os.environ["TICKS"])
        return _kernels[name](*arguments, **options)

    return launch


def clocked(call: Callable[[], object], lead: float) -> float:
    before = _launched[0]
    call()
    return float(_launched[0] - before or 1)  # a call without a launch of our kernel takes one tick


cpu.fused, cpu.whole = counted("fused"), counted("whole")
timing.clocked, limits.SIZE = clocked, 2**20
