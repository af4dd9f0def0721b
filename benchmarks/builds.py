"""How much faster on the CPU is repo_loss, or a training step, than it was in another checkout?

    python -m benchmarks.builds CHECKOUT [--what loss] [--python PYTHON] [--threads 2] [--rounds 15]

Each checkout gets a process of its own, which sets up its own problem and waits. The two take turns: in each round one
times its calls, and then the other. Printed are the median times of a call, and the median and quartiles of the ratio
within a round.

loss: forward and backward of bench_loss's problem; beside it, what the same loss in PyTorch takes in that process.
step: the parts of a step of the default run (workloads/training_step.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SERVE = "--serve"
HERE = Path(__file__).resolve().parents[1]
LARGE = {"tokens": 1024, "vocabulary": 50_257}
CASES: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16", **LARGE},
    "bf16, full KL": {"dtype": "bf16", **LARGE, "full_kl": True},
    "bf16, entropy with gradient": {"dtype": "bf16", **LARGE, "entropy_coef": 0.01},
    "fp32": {"dtype": "fp32", **LARGE},
    "fp16": {"dtype": "fp16", **LARGE},
    "fp32, 256 x 8192": {"dtype": "fp32", "tokens": 256, "vocabulary": 8192},
}
# Freed memory is kept, as repo.train does: PyTorch's temporaries are not mapped anew in each call. Threads sleep when
# they wait, since those that spin after a call of one process would slow the other's next call.
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "OMP_WAIT_POLICY": "PASSIVE"}
CALLS = {name: 1 if case["tokens"] * case["vocabulary"] > 1 << 22 else 16 for name, case in CASES.items()}
PARTS: dict[str, Callable[[Any, Any], object]] = {
    "rollout, batch 16": lambda step, batch: step.rollout(4),
    "rollout, batch 32": lambda step, batch: step.rollout(8),
    "reference": lambda step, batch: step.read_reference(batch.sequences, step.layers),
    "update": lambda step, batch: step.update(batch),
    "rollout, reference and update": lambda step, batch: step.whole(batch),
}


class Checkout:
    """A process in a checkout that times its repo_loss, or its steps, when it is asked to."""

    def __init__(self, folder: Path, python: str, threads: int, what: str) -> None:
        command = [python, str(Path(__file__).resolve()), SERVE, what, str(threads)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(folder)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, name: str) -> list[float]:
        """Return the seconds of a call of ours and, if there is one, of PyTorch's. The first call sets up the case."""
        assert self._process.stdin
        assert self._process.stdout
        print(name, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise SystemExit("the process of a checkout has ended")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(what: str, threads: int) -> None:
    """Answer the questions of `Checkout.ask` on standard input."""
    import torch

    torch.set_num_threads(threads)
    prepare = {"loss": _calls_of_loss, "step": _calls_of_step}[what]
    name, calls, number = "", list[Callable[[], object]](), 1
    for line in sys.stdin:
        if line.strip() != name:
            name = line.strip()
            calls, number = prepare(name), CALLS.get(name, 1)
        seconds = []
        for call in calls:
            start = time.perf_counter()
            for _ in range(number):
                call()
            seconds.append((time.perf_counter() - start) / number)
        print(json.dumps(seconds), flush=True)


def _calls_of_loss(name: str) -> list[Callable[[], object]]:
    """Return our loss with its gradient, and PyTorch's."""
    from benchmarks import bench_loss

    problem = bench_loss.make_problem(**{"entropy_coef": 0.0, "full_kl": False, **CASES[name]})
    losses = bench_loss.fused, bench_loss.plain
    return [functools.partial(bench_loss.gradient, loss, problem) for loss in losses]


def _calls_of_step(name: str) -> list[Callable[[], object]]:
    """Return a part of a training step."""
    try:
        from benchmarks.workloads import training_step
    except ModuleNotFoundError:  # checkouts of version 0.1.0 have it elsewhere
        from benchmarks import training_step  # type: ignore[attr-defined, no-redef]
    step = training_step.load_step(training_step.EMBEDDED)
    batch = step.random_batch(step.random_sequences(step.first(training_step.PROMPTS)))
    return [functools.partial(PARTS[name], step, batch)]


def quartiles(values: list[float]) -> str:
    """Format the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Compare the checkouts case by case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--what", choices=["loss", "step"], default="loss")
    parser.add_argument("--python", default=sys.executable, help="the other checkout's interpreter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    sides = [(HERE, sys.executable), (chosen.checkout.resolve(), chosen.python)]
    here, other = (Checkout(folder, python, chosen.threads, chosen.what) for folder, python in sides)
    print(f"{'case':30} {'here, ms':>9} {'other, ms':>10} {'other / here':>20} {'PyTorch / here':>20}")
    for name in CASES if chosen.what == "loss" else PARTS:
        rounds = [(here.ask(name), other.ask(name)) for _ in range(chosen.rounds + 1)][1:]
        mine, theirs = ([1e3 * times[side][0] for times in rounds] for side in (0, 1))
        ratios = quartiles([b / a for a, b in zip(mine, theirs, strict=True)])
        beside = quartiles([times[0][1] / times[0][0] for times in rounds]) if chosen.what == "loss" else ""
        print(
            f"{name:30} {statistics.median(mine):9.2f} {statistics.median(theirs):10.2f} {ratios:>20} {beside:>20}",
            flush=True,
        )
    here.close()
    other.close()


if __name__ == "__main__":
    serve(sys.argv[2], int(sys.argv[3])) if sys.argv[1:2] == [SERVE] else main()
