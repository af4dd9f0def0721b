"""How much faster is repo_loss on the CPU than it was in another checkout?

    python -m benchmarks.builds CHECKOUT [--python PYTHON] [--threads 2] [--rounds 15]

Each checkout gets a process of its own, which sets up the problem of its own bench_loss and waits. The two take turns:
in each round one times CALLS calls, forward and backward, and then the other. Printed are the median times of a call,
and the median and quartiles of the ratio within a round. A process says beside its own call what the same loss in
PyTorch takes there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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


class Checkout:
    """A process in another checkout that times its repo_loss when it is asked to."""

    def __init__(self, folder: Path, python: str, threads: int) -> None:
        command = [python, str(Path(__file__).resolve()), str(threads)]
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(folder)}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True)

    def ask(self, what: str, name: str) -> list[float]:
        """Set up a case ("set up"), or return seconds of a call of repo_loss and of PyTorch's loss ("time")."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([what, name]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise SystemExit("the process of a checkout has ended")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve(threads: int) -> None:
    """Answer the questions of `Checkout.ask` on standard input."""
    import torch

    from benchmarks import bench_loss

    torch.set_num_threads(threads)
    for line in sys.stdin:
        what, name = json.loads(line)
        if what == "set up":
            problem = bench_loss.make_problem(**{"entropy_coef": 0.0, "full_kl": False, **CASES[name]})
        seconds = []
        for loss in (bench_loss.fused, bench_loss.plain):
            start = time.perf_counter()
            for _ in range(CALLS[name]):
                bench_loss.gradient(loss, problem)
            seconds.append((time.perf_counter() - start) / CALLS[name])
        print(json.dumps(seconds), flush=True)


def quartiles(values: list[float]) -> str:
    """Format the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    """Compare the checkouts case by case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--python", default=sys.executable, help="the other checkout's interpreter")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    here = Checkout(HERE, sys.executable, chosen.threads)
    other = Checkout(chosen.checkout.resolve(), chosen.python, chosen.threads)
    print(f"{'case':28} {'here, ms':>9} {'other, ms':>10} {'other / here':>20} {'PyTorch / here':>20}")
    for name in CASES:
        for checkout in (other, here):
            checkout.ask("set up", name)
        rounds = [(here.ask("time", name), other.ask("time", name)) for _ in range(chosen.rounds + 1)][1:]
        mine, theirs = ([1e3 * times[side][0] for times in rounds] for side in (0, 1))
        ratios = quartiles([b / a for a, b in zip(mine, theirs, strict=True)])
        beside = quartiles([times[0][1] / times[0][0] for times in rounds])
        print(f"{name:28} {statistics.median(mine):9.2f} {statistics.median(theirs):10.2f} {ratios:>20} {beside:>20}")
    here.close()
    other.close()


if __name__ == "__main__":
    serve(int(sys.argv[1])) if sys.argv[1].isdigit() else main()
