"""What does a checkpoint cost a step?

    python -m benchmarks.bench_checkpoint

The default run with `--save_every 2`: steps that a checkpoint is written beside, in the background, in turn with steps
that have the machine for themselves, in one process. Predicted: weights and two moments of 134.5 M parameters are 1.61
GB; past the page cache they need the disk for 0.65 s and a core for 0.6 s (copy, CRC-32), of a step of about 8.5 s on
two cores: 4 to 8 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from benchmarks.timing import machine
from repo import train
from repo.checkpoint import Saver


def timed(function, seconds: list[float]):
    """The same function, which adds how long it took."""

    def call(*arguments, **options):
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    return call


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of a step with and one without a save")
    parser.add_argument("--out", type=Path, help="write the table here too")
    options = parser.parse_args()
    started, written = [], []
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        mock.patch.multiple(
            Saver,
            start=timed(Saver.start, started),
            _publish=timed(Saver._publish, written),
        ),
    ):
        run = Path(folder) / "run"
        # steps 0 and 1 warm up; the one after each save is the step beside it
        train.run_command(
            [
                f"--out={run}",
                f"--steps={2 * options.pairs + 2}",
                "--save_every=2",
                "--evaluation.prompts=0",
                "--sample_every=0",
            ]
        )
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][2:]
        size = sum(p.stat().st_size for p in (run / "checkpoints").glob("step-*/*.safetensors")) / 1e9
        size /= len(list((run / "checkpoints").glob("step-*")))
    parts = [name for name in records[0] if name.startswith("seconds_")]
    beside, alone = ([r for r in records if r["step"] % 2 == odd] for odd in (0, 1))
    rows = [
        (name.removeprefix("seconds_"), *(statistics.median(r[name] for r in group) for group in (alone, beside)))
        for name in parts
    ]
    foreground = statistics.median(started)  # waiting for the writer is part of the update's time
    totals = [statistics.median(sum(r[name] for name in parts) for r in group) for group in (alone, beside)]
    pairs = [
        sum(b[name] for name in parts) - sum(a[name] for name in parts) for b, a in zip(beside, alone, strict=True)
    ]
    cost = totals[1] - totals[0] + foreground
    quartiles = statistics.quantiles(pairs, n=4)
    lines = [
        "# What a checkpoint costs a step",
        "",
        f"`python -m benchmarks.bench_checkpoint --pairs {options.pairs}`",
        "",
        f"{machine()}. Embedded model, fp32, {options.pairs} pairs of steps; {size:.2f} GB each, written in "
        f"{statistics.median(written):.2f} s (median).",
        "",
        "| | alone, median s | beside a save, median s |",
        "|---|---|---|",
        *(f"| {name} | {a:.3f} | {b:.3f} |" for name, a, b in rows),
        f"| step | {totals[0]:.3f} | {totals[1]:.3f} |",
        "",
        f"In the foreground besides: {1000 * foreground:.0f} ms. Cost of a save: {cost:.2f} s, "
        f"{100 * cost / totals[0]:.1f} % of a step; difference within a pair: median {statistics.median(pairs):.2f} s "
        f"[{quartiles[0]:.2f}, {quartiles[2]:.2f}].",
    ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
