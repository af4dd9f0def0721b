"""How much memory does one call add at its peak to what was there?

    python -m benchmarks.harness.memory MODULE PARAMETERS WAY       # prints bytes; how the suites ask, a process a way

On a CPU the peak of the process, from /proc, in a process of its own, since what earlier calls freed may be taken
again without being seen; on CUDA the allocator's peak. What the call returns (gradients) is part of it.
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
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    """The peak is the present from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def extra_peak(call: Callable[[], object]) -> int:
    """Bytes that a call adds at its peak."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        allocator.give_back()  # what is free goes back, or the call would take it again without being seen
        before = resident("VmRSS")
        reset_peak()
        kept = call()
        peak = resident("VmHWM") - before
    del kept
    return peak


def room() -> float:
    """Bytes that can be had."""
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def in_process(module: str, parameters: Mapping[str, Any], way: str) -> int | str:
    """The extra peak of a way of a suite's case in a fresh process, or why it could not be measured."""
    command = [sys.executable, "-m", "benchmarks.harness.memory", module, json.dumps(parameters), way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return f"peak: exit status {done.returncode} {last}".strip()
    return int(done.stdout.split()[-1])


def main() -> None:
    """Warm up with a small problem of the suite (imports, threads, compiled code), then measure the one asked for."""
    module, parameters, name = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    small = {**parameters, **module.SMALL}
    way = module.setup(**parameters).ways[name]
    # what is compiled is compiled for its sizes, and nothing of it stays
    way.call() if way.compiled else module.setup(**small).ways[name].call()
    print(extra_peak(way.call))


if __name__ == "__main__":
    main()
