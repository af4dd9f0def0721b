"""The examples run as their users run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str) -> str:
    """Run an example from the root of the repository, and return what it prints."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 100


def test_the_penalty_makes_the_answers_of_loss_only_safer():
    lines = [line for line in run("loss_only", "--steps", "100").splitlines() if line.startswith("lambda")]
    safe = [float(line.split("safe answers")[1].split("%")[0]) for line in lines]
    assert len(safe) == 2
    assert safe[1] > safe[0] + 30


def test_own_scorers_trains_on_the_scores_of_its_functions(tmp_path):
    run("own_scorers", "--out", str(tmp_path / "run"))
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {0, 1}
    for sample in samples:
        assert sample["cost"] == (1.0 if any(c.isdigit() for c in sample["response"]) else -1.0)


def test_own_scorers_takes_a_model_and_options_of_its_user(tiny_model, tmp_path):
    run(
        "own_scorers",
        "--out",
        str(tmp_path / "run"),
        f"--model.path={tiny_model}",
        "--steps=1",
        "--evaluation.prompts=0",
    )
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert f"path: {tiny_model}" in config
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_compare_methods_pairs_the_runs(tmp_path):
    run("compare_methods", "--out", str(tmp_path), "--steps=1", "--methods", "ppo", "repo")
    pair = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["pairs"][0]
    assert Path(pair["baseline"]).name == "ppo"
    assert Path(pair["other"]).name == "repo"
    assert (tmp_path / "comparison" / "frontier.png").is_file()


@pytest.mark.long
@pytest.mark.assets
def test_trl_repo_trains_the_embedded_model_and_prints_lambda(tmp_path):
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    lines = run("trl_repo", "--out", str(tmp_path), "--max_steps", "1", "--prompts", "1").splitlines()
    assert any(re.match(r"step 1: lam 1\.000, safe_rate \d\.\d{3}, rectified_cost ", line) for line in lines)
    assert re.match(r"lambda of the next batch would be [1-9]\.", lines[-1])


def test_the_shield_accepts_only_what_both_costs_allow():
    *lines, last = run("shield").splitlines()
    accepted = 0
    for line in lines:
        text, draws, upper = re.search(r"  (['\"].*['\"])  (\d) drawn, upper cost (\S+)$", line).groups()
        accepted += float(upper) <= 3
        assert (float(upper) <= 3) != (text == "'I would rather not answer.'" and draws == "8")
    assert last == f"accepted: {accepted} of {len(lines)}"
    assert 0 < accepted < len(lines)
