"""A run that is killed (SIGKILL) at random moments and resumed, again and again, is the run that was never killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repo.assets import ensure

TIMES = ("seconds_", "tokens_per_second", "update_tokens_per_second")


def metrics(folder: Path) -> list[str]:
    """The lines of metrics.jsonl but for times; text, so that not a digit may differ."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in r.items() if not k.startswith(TIMES)}) for r in records]


def assert_same_run(folder: Path, whole: Path) -> None:
    assert metrics(folder) == metrics(whole)
    for name in ("samples.jsonl", "eval/before.json", "eval/after.json", "final/README.md"):
        if (whole / name).is_file():
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    a, b = (load_file(f / "final" / "model.safetensors") for f in (folder, whole))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def run_killed(kills: int, seed: int, out: Path, arguments: list[str], timeout: float) -> list[str]:
    command = [sys.executable, "-m", "tests.support.programs.killer", str(kills), str(seed), str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


CRITICS = [
    "--algorithm.advantages=gae",
    "--optimizer.epochs=2",
    "--optimizer.minibatches=2",
    "--optimizer.state_dtype=bfloat16",
]
SIMMER = ["--preset=simmer", "--penalty.limit_steps=3", "--algorithm.cost_limit=-0.5"]
BARRIER = ["--preset=barrier", "--penalty.limit_schedule=linear", "--algorithm.cost_limit=-0.5"]
INTERIOR = ["--algorithm.method=interior_point", "--penalty.lr=0.1", "--algorithm.cost_limit=0.5"]

CREDIT = [
    *("--algorithm.credit=redistributed", "--scoring.cost=tests.support.scorers:please"),
    *("--rollout.samples_per_prompt=32", "--rollout.max_response_tokens=24"),
]
PAIRS = ["--preset=repo-dpo", "--algorithm.beta=0.2"]
# accepts some policies and takes others back
GATE = ["--gate.every=1", "--gate.tolerance=0.15", "--algorithm.cost_limit=-0.5", "--evaluation.samples_per_prompt=2"]


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        pytest.param(5, [], id="5"),
        pytest.param(60, [], id="60", marks=pytest.mark.long),
        pytest.param(30, CRITICS, id="30-with-critics", marks=pytest.mark.long),
        pytest.param(20, SIMMER, id="20-with-a-limit-that-moves", marks=pytest.mark.long),
        pytest.param(10, BARRIER, id="10-with-a-barrier", marks=pytest.mark.long),
        pytest.param(10, INTERIOR, id="10-with-interior-point", marks=pytest.mark.long),
        pytest.param(10, PAIRS, id="10-on-pairs", marks=pytest.mark.long),
        pytest.param(10, CREDIT, id="10-with-learned-credit", marks=pytest.mark.long),
    ],
)
def test_a_run_killed_again_and_again_is_the_run_that_was_not(kills, more, tiny_arguments, tmp_path):
    presets, others = ([o for o in more if o.startswith("--preset") == given] for given in (True, False))
    options = [*presets, *tiny_arguments, "--steps=6", "--save_every=1", "--keep=2", "--sample_every=0", *others]
    deaths = run_killed(kills, 1, tmp_path / "run", options, timeout=1800)
    assert len(deaths) == kills
    assert len(set(deaths)) >= min(kills // 2, 6)  # in different places
    assert_same_run(tmp_path / "run", tmp_path / "run-whole")


@pytest.mark.long
def test_a_run_whose_policies_are_taken_back_survives_kills(tiny_arguments, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Tell me number {i}."}) + "\n" for i in range(40)))
    steps = ["--steps=6", "--save_every=1", "--keep=2", "--sample_every=0"]
    deaths = run_killed(20, 3, tmp_path / "run", [*tiny_arguments, f"--data.train={path}", *steps, *GATE], timeout=1800)
    assert len(deaths) == 20
    assert_same_run(tmp_path / "run", tmp_path / "run-whole")
    assert {r["gate_accepted"] for r in map(json.loads, metrics(tmp_path / "run"))} == {0.0, 1.0}


@pytest.mark.long
@pytest.mark.assets
def test_the_embedded_default_survives_kills(tmp_path):
    ensure()
    options = ["--steps=5", "--save_every=1", "--evaluation.prompts=0"]
    deaths = run_killed(5, 2, tmp_path / "run", options, timeout=3000)
    assert len(deaths) == 5
    assert_same_run(tmp_path / "run", tmp_path / "run-whole")
