"""Runs on pairs: constrained DPO and its rectified form, on sampled pairs and on those of the data."""

import json
import math
from itertools import pairwise

import pytest
import torch
import yaml
from safetensors.torch import load_file

from repo import course, loop, train
from repo.common.errors import UserError
from repo.config.parse import PRESETS
from repo.config.schema import DUAL_EVERY
from repo.reporting import figures, run_history, small_panels
from repo.reporting.small_panels import PAIRS
from repo.rollout import pairs as drawing
from tests.support.run_folders import lines, run, without_times
from tests.support.tiny import QUESTIONS, TEXT

STEPS = 2 * DUAL_EVERY + 1
MEASURED = ("reward_mean", "cost_mean", "safe_rate", "rectified_cost", "compensation_gap", "kl", "length", "truncated")


@pytest.fixture(scope="module")
def on_pairs(tiny_arguments):
    beta, lam = "--algorithm.beta=0.2", "--penalty.lr=0.5"
    return [
        *tiny_arguments,
        f"--steps={STEPS}",
        "--save_every=3",
        "--evaluation.prompts=0",
        "--sample_every=0",
        beta,
        lam,
    ]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A file of six prompts, each with a pair; the first prompt has two pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    questions, texts = [*QUESTIONS, QUESTIONS[0]], [TEXT[i % 5].partition(" ")[2][: 12 + i] for i in range(14)]
    rows = [{"id": i, "prompt": q, "response_0": texts[i], "response_1": texts[i + 7]} for i, q in enumerate(questions)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=["cdpo", "repo_dpo"])
def finished(request, on_pairs, tmp_path_factory):
    method = request.param
    return run([f"--preset={method.replace('_', '-')}", *on_pairs], tmp_path_factory.mktemp(method) / "run")


def test_lambda_follows_its_rule_by_what_the_policy_says_every_few_steps(finished):
    method = yaml.safe_load((finished / "config.yaml").read_text())["algorithm"]["method"]
    records, samples = lines(finished), lines(finished, "samples.jsonl")
    assert records[0]["lam"] == 1.0
    for this, following in pairwise(records):
        costs = [s["cost"] for s in samples if s["step"] == this["step"]]
        if (this["step"] + 1) % DUAL_EVERY:
            assert costs == []
            assert [this[key] for key in MEASURED] == [None] * len(MEASURED)
            assert following["lam"] == this["lam"]
            continue
        assert len(costs) == 6  # two prompts, three responses
        assert this["rectified_cost"] == pytest.approx(sum(max(c, 0) for c in costs) / 6)
        move = sum(costs) / 6 if method == "cdpo" else this["rectified_cost"]
        assert following["lam"] == pytest.approx(min(max(this["lam"] + 0.5 * move, 0), 10))
        assert following["lam"] != this["lam"]
        assert this["kl"] > 0


def test_every_step_has_its_metrics(finished):
    for record in lines(finished):
        assert record["skipped"] == 0
        assert record["grad_norm"] > 0
        assert 0 <= record["pair_accuracy"] <= 1
        assert 0.5 <= record["pair_confidence"] <= 1
    first = lines(finished)[0]  # the policy is the reference
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["pair_margin"] == pytest.approx(0, abs=1e-5)
    assert first["pair_log_ratio"] == pytest.approx(0, abs=1e-5)
    assert lines(finished)[-1]["pair_margin"] != 0


def test_a_report_joins_the_steps_that_sampled(finished, monkeypatch):
    history = run_history.read(finished)
    assert history.sampled == [DUAL_EVERY - 1, 2 * DUAL_EVERY - 1]
    trend, steps = figures.trend, []

    def noting(axes, at, *more):
        steps.append(at.tolist())
        trend(axes, at, *more)

    for module in (figures, small_panels):
        monkeypatch.setattr(module, "trend", noting)
    drawn = {figure.name for figure in figures.draw_all(history)}
    assert {"reward", "safe_rate", "penalty", "pairs", "training"} <= drawn
    assert [DUAL_EVERY, 2 * DUAL_EVERY] in steps
    # the gradient norm and what is of pairs is known in each
    assert steps.count(list(range(1, STEPS + 1))) == 1 + len(PAIRS)
    assert len({tuple(at) for at in steps}) == 2


def test_a_killed_run_goes_on_as_if_nothing_had_happened(finished, on_pairs, tmp_path, monkeypatch):
    method = yaml.safe_load((finished / "config.yaml").read_text())["algorithm"]["method"]
    out, start = tmp_path / "run", course.Course.record

    def killed(course, step, *more):
        if step == DUAL_EVERY + 1:  # a step after the first that sampled; the checkpoint before it is of step 6
            raise MemoryError
        start(course, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(course.Course, "record", killed)
        with pytest.raises(MemoryError):
            run([f"--preset={method.replace('_', '-')}", *on_pairs], out)
    assert len(lines(out)) == DUAL_EVERY + 1
    train.run_command(["--resume", str(out)])
    assert without_times(lines(out)) == without_times(lines(finished))
    assert lines(out, "samples.jsonl") == lines(finished, "samples.jsonl")
    a, b = (load_file(folder / "final" / "model.safetensors") for folder in (out, finished))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_pairs_are_sampled_from_the_reference_and_not_from_the_policy(on_pairs, tmp_path, monkeypatch):
    drawn = []

    def seen(*arguments):
        pairs = drawing.draw_pairs(*arguments)
        drawn.append([(prompt.id, text) for prompt, text in zip(pairs.prompts, pairs.texts, strict=True)])
        return pairs

    monkeypatch.setattr(loop, "draw_pairs", seen)
    for lr in ("1e-3", "1e-5"):
        run(on_pairs, tmp_path / lr, "--algorithm.method=cdpo", "--steps=4", f"--optimizer.lr={lr}")
    assert drawn[:4] == drawn[4:]
    every = [response for responses in drawn[:4] for response in responses]
    assert len({prompt for prompt, _ in every}) == 4
    assert len(set(every)) == len(every) == 16  # two epochs of four prompts: new pairs in each


def test_given_pairs_are_learned_from_and_nothing_is_sampled_for_them(on_pairs, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drawing, "sample", None)
    data = [f"--data.train={given}", "--rollout.max_response_tokens=20", "--algorithm.method=repo_dpo"]
    more = ["--optimizer.lr=3e-3", "--optimizer.epochs=2", "--rollout.prompts_per_step=7", "--penalty.lr=0"]
    folder = run(on_pairs, tmp_path / "run", *data, *more)
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"pairs: 7 of {given}, dropped: none" in printed
    assert "batch: 7 pairs, and every 5 steps 7 prompts x 3 samples = 21 responses of the policy" in printed
    records = lines(folder)
    assert records[-1]["loss"] < records[0]["loss"] - 0.05
    assert records[-1]["pair_accuracy"] > 0.8
    (tmp_path / "run" / "final").rename(tmp_path / "away")
    given_rows = given.read_text()
    given.write_text(given_rows.replace("sorry", "happy"))
    with pytest.raises(UserError, match="the input named by data.train has changed"):
        train.run_command(["--resume", str(folder), f"--steps={STEPS + 1}"])
    given.write_text(given_rows)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--algorithm.advantages=gae"], "algorithm.advantages must be group with method cdpo, which does not use it"),
        (["--ptx.data=answers.jsonl"], "ptx.data must be null with method cdpo, which does not use it"),
        (["--algorithm.clip_range=[0.1, 0.2]"], "algorithm.clip_range must be (0.2, 0.2) with method cdpo"),
        (["--algorithm.kl_target=0.1"], "algorithm.kl_target must be null with method cdpo"),
        (["--rollout.truncated=mask"], "rollout.truncated must be keep with method cdpo"),
        (["--rollout.truncation_penalty=2"], "rollout.truncation_penalty must be 1.0 with method cdpo"),
        (["--ptx.coef=0.5"], "ptx.coef must be 16.0 with method cdpo"),
        (["--critic.lr=1e-3"], "critic.lr must be 0.0001 with method cdpo"),
        (["--rollout.engine=vllm"], "rollout.engine must be transformers with method cdpo"),
        (["--algorithm.beta=0"], "algorithm.beta must be > 0 with method cdpo; got 0.0"),
        (["--penalty.initial=20"], "penalty.max must be >= penalty.initial = 20.0"),
        (["--optimizer.minibatches=3"], "optimizer.minibatches must be in 1..2 (pairs per step); got 3"),
    ],
)
def test_fields_that_have_no_effect_are_refused(more, message, on_pairs, tmp_path):
    with pytest.raises(UserError) as error:
        run(on_pairs, tmp_path / "run", "--algorithm.method=cdpo", *more)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_record_with_one_response_is_refused_by_its_line_and_serves_other_methods(on_pairs, given, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text(given.read_text() + json.dumps({"prompt": "And water?", "response_0": "Blue."}) + "\n")
    with pytest.raises(UserError, match=r"one.jsonl:8: a pair needs `response_0` and `response_1`"):
        run(on_pairs, tmp_path / "run", "--algorithm.method=cdpo", f"--data.train={path}")
    assert len(lines(run(on_pairs, tmp_path / "other", f"--data.train={path}", "--steps=1"))) == 1


def test_one_sample_of_the_policy_is_enough(on_pairs, tmp_path):
    options = ["--algorithm.method=cdpo", "--rollout.samples_per_prompt=1", f"--steps={DUAL_EVERY}"]
    folder = run(on_pairs, tmp_path / "run", *options)
    assert len(lines(folder, "samples.jsonl")) == 2


def test_a_lora_run_learns_from_pairs_of_its_base(on_pairs, tmp_path):
    folder = run(on_pairs, tmp_path / "run", "--algorithm.method=repo_dpo", "--model.lora_rank=2", "--steps=2")
    assert lines(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines(folder)[1]["pair_log_ratio"] != 0


@pytest.mark.parametrize("name", ["cdpo", "repo-dpo"])
def test_the_presets_change_the_method_and_go_with_the_embedded_one(name, tiny_arguments, capsys):
    preset = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    assert preset["algorithm"]["method"] == name.replace("-", "_")
    train.run_command(["--preset=embedded", f"--preset={name}", *tiny_arguments, "--dry-run"])
    assert "pairs: sampled from the reference in each step" in capsys.readouterr().out
