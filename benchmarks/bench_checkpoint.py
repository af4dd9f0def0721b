"""How much time does a checkpoint add to a step?

    pytest benchmarks/bench_checkpoint.py           # table; --quick, --save, --compare OLD.json

The default run with `--save_every 2`, in one process: steps during which a checkpoint is written in the background
alternate with steps that have the machine to themselves. Predicted: weights and two moments of 134.5 M parameters are
1.61 GB; written past the page cache they take the disk 0.65 s and a core 0.6 s (copy, CRC-32), of a step of about 8.5 s
on two cores: 4 to 8 %.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.bench_step import timed
from benchmarks.harness.machine import provenance
from benchmarks.harness.results import LIMIT, OURS, Case, Row
from benchmarks.workloads.models import EMBEDDED, folder_of
from repo import train
from repo.runs.checkpoint import Saver

ALONE, BESIDE = "step alone", "step beside a save"


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the embedded model, or a tiny one with --quick."""
    return {"tiny": {"model": "tiny", "pairs": 2}} if quick else {EMBEDDED: {"model": EMBEDDED, "pairs": 8}}


def run(folder: Path, model: str, pairs: int) -> list[dict[str, float]]:
    """Train and return the metrics of every step but the first two, which warm up.

    Saves end odd steps, so that an even step runs beside the writing.
    """
    options = {
        "out": folder,
        "steps": 2 * pairs + 2,
        "save_every": 2,
        "sample_every": 0,
        "evaluation.prompts": 0,
        "optimizer.lr": 1e-6,
    }
    if model != EMBEDDED:
        options |= {"model.path": folder_of(model), "scoring.reward": "benchmarks.workloads.trainers:echo"}
        options |= {"scoring.cost": "benchmarks.workloads.trainers:no_cost", "evaluation.judge": "none"}
    train.run_command([f"--{name}={value}" for name, value in options.items()])
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][2:]


def test_checkpoint(benchmark, record, case) -> None:
    """Measure a run whose steps are the rounds."""
    name, parameters = case
    started, written, where, records = list[float](), list[float](), provenance(), list[dict[str, float]]()
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        mock.patch.multiple(Saver, start=timed(Saver.start, started), _publish=timed(Saver._publish, written)),
    ):
        call = lambda: records.extend(run(Path(folder) / "run", **parameters))  # noqa: E731
        benchmark.pedantic(call, rounds=1)
        saved = sorted((Path(folder) / "run" / "checkpoints").glob("step-*"))[-1]
        size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    parts = [part for part in records[0] if part.startswith("seconds_")]
    seconds = {odd: [sum(r[part] for part in parts) for r in records if r["step"] % 2 == odd] for odd in (0, 1)}
    foreground = statistics.median(started)  # the wait for the writer is part of the update's time
    rows = [Row(ALONE, LIMIT, seconds[1], work=1), Row(BESIDE, OURS, [s + foreground for s in seconds[0]], work=1)]
    medians = [statistics.median(row.seconds) for row in rows]
    notes = {
        "Cost of a save": f"{medians[1] - medians[0]:.2f} s, {100 * (medians[1] / medians[0] - 1):.1f} % of a step",
        "In the foreground of it": f"{1000 * foreground:.0f} ms",
        "Written": f"{size / 1e9:.2f} GB in {statistics.median(written):.2f} s (median), in the background",
    }
    formula = f"{parameters['pairs']} pairs of steps of the default run, whose responses differ in length"
    record(Case("checkpoint", name, parameters, "steps", formula, BESIDE, rows, where, notes))
