"""How much less than a trained dense head does a LoRA head take, in time and in memory?

    python -m benchmarks.workloads.lora_head            # --tokens, --hidden, --vocabulary, --rounds

Forward and backward of linear_repo_loss, fp32, the ways of bench_linear.py in turns; a ratio is of two calls of the
same round. Predicted for N = 1024, V = 49 152, H = 576, r = 16:

- Operations: a trained head takes three GEMMs, 6 N H V = 174 GFLOP; a LoRA head takes two and three thin ones,
  4 N H V + 6 N r V = 121 GFLOP, 0.69 of it. The thin ones pass over the logits: two reads of 4 N V bytes, 0.4 GB, since
  the third meets a block of logits in the caches; that is 0.02 of the time at 16 GB/s. Together 0.71 to 0.72.
- Memory: a chunk of 256 rows of logits is 50 MB; a trained head adds dL/dweight, 4 H V = 113 MB, a LoRA head
  dL/dB, 4 r V = 3 MB; both add dL/dhidden, 2 MB, and what MKL copies, 1 to 2 MB. That is 57 of 167 MB, 0.34.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch

from benchmarks import bench_linear
from benchmarks.harness.memory import in_process
from benchmarks.harness.timing import Timing, clocked, summary

DENSE, LORA, FROZEN = "linear_repo_loss", "linear_repo_loss, LoRA head", "linear_repo_loss, frozen head"


def timings(parameters: dict[str, Any], rounds: int) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """Return by way the seconds, and the ratio to the trained dense head."""
    ways = bench_linear.setup(**parameters).ways
    calls = {name: ways[name].call for name in (DENSE, LORA, FROZEN)}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            seconds[name].append(clocked(calls[name]))
    kept = {name: values[1:] for name, values in seconds.items()}  # the first round warms up
    ratios = {
        name: summary([one / dense for one, dense in zip(values, kept[DENSE], strict=True)])
        for name, values in kept.items()
    }
    return {name: summary(values) for name, values in kept.items()}, ratios


def main() -> None:
    """Measure and print a line for each head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=bench_linear.HIDDEN)
    parser.add_argument("--vocabulary", type=int, default=bench_linear.VOCABULARY)
    parser.add_argument("--rounds", type=int, default=15)
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    seconds, ratios = timings(options, rounds)
    peaks = {name: in_process("benchmarks.bench_linear", options, name) for name in seconds}
    print(f"{options}, {torch.get_num_threads()} threads, {rounds} rounds; median (quartiles)")
    for name, took in seconds.items():
        ratio, peak, dense = ratios[name], peaks[name], peaks[DENSE]
        known = isinstance(peak, int) and isinstance(dense, int)
        print(
            f"{name:30}  {took.median:.3f} s ({took.low:.3f} to {took.high:.3f}), "
            f"ratio {ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), "
            + (f"{int(peak) / 1e6:.1f} MB, ratio {int(peak) / int(dense):.3f}" if known else str(peak))
        )


if __name__ == "__main__":
    main()
