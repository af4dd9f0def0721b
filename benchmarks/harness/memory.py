"""Measure how much memory one call adds at its peak.

    python -m benchmarks.harness.memory MODULE PARAMETERS WAY       # prints bytes; the suites start one process per way

On a CPU this is the peak of the process, from /proc, in a process of its own, because memory that earlier calls freed
could be reused unseen; on CUDA it is the allocator's peak. What the call returns (gradients) counts.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import allocator
from benchmarks.harness.machine import ROOT


def resident(name: str) -> int:
    """Return the bytes of VmRSS (now) or VmHWM (peak) of this process."""
    line = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert line is not None
    return int(line[1]) * 1024


def reset_peak() -> None:
    """Reset VmHWM to the memory in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def extra_peak(call: Callable[[], object]) -> int:
    """Return the bytes that a call adds at its peak."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        allocator.give_back()  # free memory goes back to the system, or the call would reuse it unseen
        before = resident("VmRSS")
        reset_peak()
        kept = call()
        peak = resident("VmHWM") - before
    del kept
    return peak


def room() -> float:
    """Return the bytes that are available."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    line = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert line is not None
    return 1024.0 * int(line[1])


def in_process(module: str, parameters: Mapping[str, Any], way: str) -> int | str:
    """Return the extra peak of one way of a suite's case in a fresh process, or why it could not be measured."""
    command = [sys.executable, "-m", "benchmarks.harness.memory", module, json.dumps(parameters), way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"peak: exit status {done.returncode} {last}".strip()
    return int(done.stdout.split()[-1])


def main() -> None:
    """Warm up with a small problem of the suite (imports, threads, compiled code), then measure the given one."""
    module, parameters, name = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    small = {**parameters, **module.SMALL}
    way = module.setup(**parameters).ways[name]
    # A compiled way is warmed up at its own sizes, for which it is compiled; nothing else of that call stays.
    way.call() if way.compiled else module.setup(**small).ways[name].call()
    print(extra_peak(way.call))


if __name__ == "__main__":
    main()
