"""The command: runs on a model, prompts and scorers of the user's own, and resumes."""

import json
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from repo import course, launch, train
from repo.common.errors import UserError
from repo.reporting import after_run
from repo.reporting.after_run import draw_report
from repo.rollout import engine
from tests.support.run_folders import lines, run, without_times

REQUIRED = (
    "step reward_mean cost_mean safe_rate rectified_cost compensation_gap lam kl entropy clip_frac "
    "response_tokens tokens_per_second"
).split()


@pytest.fixture(scope="module")
def finished(tiny_arguments, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(after_run, "draw_report", draw_report)
        return run(tiny_arguments, tmp_path_factory.mktemp("runs") / "a")


def test_a_run_leaves_everything_that_was_promised(finished, tiny_model):
    records = lines(finished)
    assert [r["step"] for r in records] == [0, 1, 2, 3]
    assert all(set(REQUIRED) <= r.keys() for r in records)
    assert len(lines(finished, "samples.jsonl")) == 4 * 6
    assert yaml.safe_load((finished / "config.yaml").read_text())["model"]["path"] == str(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(finished / "final")
    AutoTokenizer.from_pretrained(finished / "final")
    assert (finished / "final" / "model.safetensors").is_file()
    start = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    card = (finished / "final" / "README.md").read_text()
    assert "safe rate" in card
    assert "too few prompts for intervals" in card
    assert "Per-prompt goal" in card
    assert (finished / "report" / "index.html").is_file()
    for name in ("before", "after"):
        summary = json.loads((finished / "eval" / f"{name}.json").read_text())["summary"]
        assert summary["overall"]["reward"]["low"] is None  # of two prompts there is no interval
        assert summary["overall"]["reward"]["mean"] is not None


def test_lambda_follows_its_rule_line_by_line(finished):
    records = lines(finished)
    assert records[0]["lam"] == 1.0
    for this, following in pairwise(records):
        assert following["lam"] == min(this["lam"] + 2.0 * this["rectified_cost"], 10.0)


def test_metrics_agree_with_the_samples(finished):
    samples = lines(finished, "samples.jsonl")
    for record in lines(finished):
        costs = [s["cost"] for s in samples if s["step"] == record["step"]]
        assert record["cost_mean"] == pytest.approx(sum(costs) / 6)
        assert record["safe_rate"] == pytest.approx(sum(c <= 0 for c in costs) / 6)
        hinge = sum(max(c, 0) for c in costs) / 6
        assert record["rectified_cost"] == pytest.approx(hinge)
        assert record["compensation_gap"] == pytest.approx(hinge - max(sum(costs) / 6, 0))
        assert record["compensation_gap"] >= 0


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tiny_arguments, tmp_path):
    again = run(tiny_arguments, tmp_path / "again")
    assert without_times(lines(again)) == without_times(lines(finished))
    other = run(tiny_arguments, tmp_path / "other", "--seed=1")
    assert without_times(lines(other)) != without_times(lines(finished))


def test_resuming_gives_the_run_that_was_never_stopped(finished, tiny_arguments, tmp_path):
    part = run(tiny_arguments, tmp_path / "part", "--steps=2")
    assert (part / "final").is_dir()
    (part / "metrics.jsonl").open("a").write('{"step": 2, "torn')  # a line of a step that was not saved
    train.run_command(["--resume", str(part), "--steps=4"])
    assert without_times(lines(part)) == without_times(lines(finished))
    assert lines(part, "samples.jsonl") == lines(finished, "samples.jsonl")
    for name in ("before", "after"):
        assert (part / "eval" / f"{name}.json").read_text() == (finished / "eval" / f"{name}.json").read_text()
    assert (part / "final" / "README.md").read_text() == (finished / "final" / "README.md").read_text()
    first, second = (load_file(f / "final" / "model.safetensors") for f in (part, finished))
    assert all(torch.equal(first[k], second[k]) for k in second)


def test_a_run_that_stopped_before_its_final_evaluation_is_finished(finished, tiny_arguments, tmp_path, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(course, "finish", out_of_memory)
        with pytest.raises(MemoryError):
            run(tiny_arguments, tmp_path / "run")
    assert not (tmp_path / "run" / "final").exists()
    train.run_command(["--resume", str(tmp_path / "run")])
    after = json.loads((tmp_path / "run" / "eval" / "after.json").read_text())
    assert after == json.loads((finished / "eval" / "after.json").read_text())


def test_a_run_that_died_before_its_first_checkpoint_starts_over(finished, tiny_arguments, tmp_path, monkeypatch):
    def died(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(course.Saver, "start", died)
        with pytest.raises(MemoryError):
            run(tiny_arguments, tmp_path / "run")
    train.run_command(["--resume", str(tmp_path / "run")])
    assert without_times(lines(tmp_path / "run")) == without_times(lines(finished))


def test_a_resume_that_fails_to_start_loses_nothing(finished, monkeypatch):
    def files():
        return {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}

    def missing(*_):
        raise UserError("a package is missing")

    before = files()
    monkeypatch.setattr(launch, "load_parts", missing)
    with pytest.raises(UserError, match="a package is missing"):
        train.run_command(["--resume", str(finished), "--steps=9"])
    assert files() == before


def test_the_model_card_names_no_folder_of_this_machine(finished, tiny_model):
    card = (finished / "final" / "README.md").read_text()
    assert str(tiny_model.parent) not in card
    assert f"Base model: `{tiny_model.name}`" in card


def test_a_signal_saves_and_says_how_to_go_on(finished, tiny_arguments, tmp_path, monkeypatch, capsys):
    plain = engine.sample

    def interrupted(policy, prompts, samples, config, seed, step, part):
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return plain(policy, prompts, samples, config, seed, step, part)

    monkeypatch.setattr(engine, "sample", interrupted)
    folder = run(tiny_arguments, tmp_path / "stopped")
    assert len(lines(folder)) == 2
    assert f"--resume {folder}" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(engine, "sample", plain)
    train.run_command(["--resume", str(folder)])
    assert without_times(lines(folder)) == without_times(lines(finished))


def test_a_resume_may_change_what_does_not_change_the_steps_done(tiny_arguments, tmp_path):
    folder = run(tiny_arguments, tmp_path / "run", "--steps=1", "--evaluation.prompts=0")
    more = ["--scoring.timeout=9", "--optimizer.max_skipped=7", "--loggers=[tensorboard]"]
    train.run_command(["--resume", str(folder), "--steps=2", *more])
    assert len(lines(folder)) == 2


def test_resume_refuses_what_is_no_run_and_what_would_change_it(finished, tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        train.run_command(["--resume", str(tmp_path)])
    with pytest.raises(UserError, match="already has 4 steps; ask for more with --steps"):
        train.run_command(["--resume", str(finished)])
    with pytest.raises(UserError, match=r"algorithm.beta was 0.02 in this run and cannot become 0.5"):
        train.run_command(["--resume", str(finished), "--steps=9", "--algorithm.beta=0.5"])
    with pytest.raises(UserError, match="--resume: expected one argument"):
        train.run_command(["--resume"])
