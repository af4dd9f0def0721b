"""A pytest plugin for the benchmarks: a clock that counts kernel launches, of which each takes as many ticks as TICKS.

    TICKS=2 python -m pytest -p tests.benchmarks.ticks benchmarks/bench_loss.py --quick

With it a run of the benchmarks is the same every time, and a kernel can be made slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from benchmarks.harness import timing
from repo_kernels.backends import cpu

_launched = [0]
_fused = cpu.fused


def fused(*arguments, **options):
    _launched[0] += int(os.environ["TICKS"])
    return _fused(*arguments, **options)


def clocked(call: Callable[[], object]) -> float:
    before = _launched[0]
    call()
    return float(_launched[0] - before or 1)  # what launches none of our kernels takes one tick


cpu.fused, timing.clocked = fused, clocked
