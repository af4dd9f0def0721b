"""Runs that go on with other fields, inputs or packages: refused, allowed by name, or warned of."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from repo import train
from repo.common.errors import UserError
from tests.support.run_folders import files, lines


def test_a_file_that_lost_lines_is_not_gone_on_with(options, tmp_path):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=2", f"--out={out}"])
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text.splitlines(keepends=True)[0])
    before = files(out)
    with pytest.raises(UserError, match=r"metrics.jsonl has \d+ bytes, \d+ when the checkpoint"):
        train.run_command(["--resume", str(out), "--steps=4"])
    assert files(out) == before


def test_a_changed_field_may_be_allowed_by_name(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=1", f"--out={out}"])
    with pytest.raises(UserError, match="cannot become 0.5 unless --allow-change algorithm.beta is given"):
        train.run_command(["--resume", str(out), "--steps=2", "--algorithm.beta=0.5"])
    with pytest.raises(UserError, match="--allow-change takes fields of the configuration; got 'beta'"):
        train.run_command(["--resume", str(out), "--steps=2", "--algorithm.beta=0.5", "--allow-change=beta"])
    train.run_command(["--resume", str(out), "--steps=2", "--algorithm.beta=0.5", "--allow-change=algorithm.beta"])
    assert "warning: algorithm.beta was 0.02 in this run and is now 0.5" in capsys.readouterr().out
    train.run_command(["--resume", str(out), "--steps=3"])  # it stays so


def test_a_changed_input_is_refused_and_may_be_allowed_by_name(options, tiny_model, tiny_prompts, tmp_path, capsys):
    model, prompts = shutil.copytree(tiny_model, tmp_path / "model"), shutil.copy(tiny_prompts[0], tmp_path / "p.jsonl")
    code = tmp_path / "changing_scores.py"
    code.write_text("def cost(prompts, responses):\n    return [1.0] * len(responses)\n")
    mine = [f"--model.path={model}", f"--data.train={prompts}", "--scoring.cost=changing_scores:cost"]
    out, command = tmp_path / "run", [sys.executable, "-m", "repo.train"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path.cwd()}"}

    def call(*arguments):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, env=environment)
        return done.returncode, done.stderr + done.stdout

    assert call(*options, *mine, "--steps=1", f"--out={out}")[0] == 0
    before = files(out)
    code.write_text("def cost(prompts, responses):\n    return [2.0] * len(responses)\n")
    status, text = call("--resume", str(out), "--steps=2")
    assert status == 2
    assert "error: --resume: the input named by scoring.cost has changed since the run began" in text
    assert files(out) == before
    status, text = call("--resume", str(out), "--steps=2", "--allow-change=scoring.cost")
    assert status == 0
    assert "warning: the input named by scoring.cost has changed since the run began" in " ".join(text.split())
    again = ["--resume", str(out), "--steps=3", "--scoring.cost=tests.support.scorers:cost"]
    Path(prompts).write_text(Path(prompts).read_text() + '{"prompt": "One more?"}\n')
    with pytest.raises(UserError, match="the input named by data.train has changed"):
        train.run_command([*again, "--allow-change=scoring.cost"])
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the input named by model.path has changed"):
        train.run_command([*again, "--allow-change=scoring.cost", "--allow-change=data.train"])


def test_an_allowed_input_stays_allowed(options, tiny_prompts, tmp_path):
    prompts = Path(shutil.copy(tiny_prompts[0], tmp_path / "p.jsonl"))
    out = tmp_path / "run"
    train.run_command([*options, f"--data.train={prompts}", "--steps=1", f"--out={out}"])
    prompts.write_text(prompts.read_text() + '{"prompt": "One more?"}\n')
    train.run_command(["--resume", str(out), "--steps=2", "--allow-change=data.train"])
    train.run_command(["--resume", str(out), "--steps=3"])
    assert len(lines(out)) == 3


def test_more_steps_of_a_cosine_are_warned_of(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=1", "--optimizer.schedule=cosine", f"--out={out}"])
    train.run_command(["--resume", str(out), "--steps=2"])
    assert "with optimizer.schedule cosine the learning rate of further steps changes" in " ".join(
        capsys.readouterr().out.split()
    )


def test_how_a_run_computes_is_recorded_and_other_package_versions_are_warned_of(options, tmp_path, capsys):
    out = tmp_path / "run"
    train.run_command([*options, "--steps=1", f"--out={out}"])
    ways = json.loads((out / "execution.json").read_text())
    printed = " ".join(capsys.readouterr().out.split())
    assert f"attention: {ways['attention']}; decoding: {ways['decoding']}" in printed
    known = json.loads((out / "versions.json").read_text())
    (out / "versions.json").write_text(json.dumps(known | {"torch": "1.0"}))
    train.run_command(["--resume", str(out), "--steps=2"])
    assert f"so results may not be bit-identical: torch 1.0 -> {known['torch']}" in " ".join(
        capsys.readouterr().out.split()
    )
