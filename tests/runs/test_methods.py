"""Runs of the methods whose limit or lambda has a rule of its own: their metrics follow it, also when resumed."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from repo import train
from tests.support.run_folders import lines, without_times

LIMIT = -0.5
STEPS = 5  # of the limit's course
SIMMER = ["--preset=simmer", f"--penalty.limit_steps={STEPS}"]
LINEAR = ["--preset=barrier", "--penalty.limit_schedule=linear", f"--penalty.limit_steps={STEPS}"]
INTERIOR = ["--algorithm.method=interior_point", "--penalty.lr=0.1", "--penalty.max=4"]


def run(folder: Path, preset: list[str], options: list[str], *more: str) -> list[dict]:
    train.run_command([*preset, *options, f"--algorithm.cost_limit={LIMIT}", f"--out={folder}", *more])
    return without_times(lines(folder))


def costs_of(folder: Path, step: int) -> np.ndarray:
    return np.array([s["cost"] for s in lines(folder, "samples.jsonl") if s["step"] == step])


@pytest.mark.parametrize("preset", [SIMMER, LINEAR, INTERIOR], ids=["simmer", "barrier", "interior_point"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(preset, options, tmp_path):
    whole = run(tmp_path / "whole", preset, options, "--steps=6")
    run(tmp_path / "part", preset, options, "--steps=3")
    train.run_command(["--resume", str(tmp_path / "part"), "--steps=6"])
    assert without_times(lines(tmp_path / "part")) == whole
    for name in ("samples.jsonl", "final/model.safetensors"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    moved = "lam" if preset is INTERIOR else "limit"
    assert len({record[moved] for record in whole}) > 2
    assert len({record[moved] for record in whole[3:]}) > 1  # else the state would not matter


@pytest.mark.parametrize("preset", [SIMMER, LINEAR], ids=["simmer", "barrier"])
def test_metrics_are_of_the_runs_limit_and_lambda_moves_by_that_of_the_step(preset, options, tmp_path):
    records = run(tmp_path / "run", preset, options, "--steps=5", "--penalty.lr=0.5")
    limits = [record["limit"] for record in records]
    assert limits[0] == pytest.approx(np.quantile(costs_of(tmp_path / "run", 0), 0.9))
    assert all(LIMIT <= limit <= limits[0] for limit in limits)
    total, step = 0.0, (limits[0] - LIMIT) / STEPS
    for k, (this, following) in enumerate(pairwise(records)):
        costs = costs_of(tmp_path / "run", k)
        excess, unsafe = np.maximum(costs - this["limit"], 0).mean(), (costs > this["limit"]).mean()
        assert this["limit_rectified_cost"] == pytest.approx(excess, abs=1e-6)
        assert this["limit_unsafe_rate"] == pytest.approx(unsafe)
        assert this["rectified_cost"] == pytest.approx(np.maximum(costs - LIMIT, 0).mean(), abs=1e-6)
        assert this["safe_rate"] == pytest.approx((costs <= LIMIT).mean())
        assert following["lam"] == min(this["lam"] + 0.5 * this["limit_rectified_cost"], 10.0)
        if preset is SIMMER:
            total = np.clip(total + 0.1 - unsafe, -1.0, 1.0)
            expected = this["limit"] - step / 0.1 * (0.5 * (0.1 - unsafe) + 0.05 * total)
        else:
            expected = this["limit"] - step
        assert following["limit"] == pytest.approx(np.clip(expected, LIMIT, limits[0]))
    samples = lines(tmp_path / "run", "samples.jsonl")
    assert all(sample["safe"] == (sample["cost"] <= LIMIT) for sample in samples)


def test_lambda_of_interior_point_can_be_checked_line_by_line(options, tmp_path):
    records = run(tmp_path / "run", INTERIOR, options, "--steps=5", "--algorithm.cost_limit=0.2")
    assert records[0]["lam"] == 1.0
    for k, (this, following) in enumerate(pairwise(records), 1):
        slack = 0.2 - this["cost_mean"]
        expected = 4.0 if slack < 0 else min(1 / 1.1**k / max(slack, 1e-3), 4.0)
        assert following["lam"] == pytest.approx(expected, rel=1e-5)
    assert "limit" not in records[0]
