"""Bad input of the command is one sentence, and what was there before stays."""

import json

import pytest

from repo import train
from repo.common.errors import UserError
from tests.support.run_folders import lines, run


def test_a_start_that_fails_leaves_the_name_free(tiny_arguments, tmp_path):
    with pytest.raises(UserError, match="prompt file not found"):
        run(tiny_arguments, tmp_path / "run", "--data.train=typo.jsonl")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stps=3"], "unknown configuration key 'stps'; did you mean 'steps'?"),
        (["--optimizer.learning=3"], "unknown configuration key 'optimizer.learning'"),
        (["--steps=many"], "steps must be an integer > 0; got 'many'"),
        (["--rollout.samples_per_prompt=1"], "rollout.samples_per_prompt must be >= 2"),
        (["--algorithm.method=dpo"], "algorithm.method"),
        (["--config=nowhere.yaml"], "config: File does not exist:"),
        (["--data.train=nowhere.jsonl"], "prompt file not found: nowhere.jsonl"),
        (["--model.path=nowhere/model"], "model.path: no such folder: 'nowhere/model', nor is it in the hub's cache"),
        (["--model.path=./runs/mine/final"], "model.path: no such folder: './runs/mine/final'"),
        (["--scoring.reward=nowhere:f"], "scoring.reward: cannot import module 'nowhere'"),
        (["--scoring.cost=tests.support.scorers:none"], "has no function 'none'"),
        (
            ["--scoring.cost=oops"],
            "scoring.cost must be 'embedded', a model (folder or hub name) or 'module:function'; got 'oops'",
        ),
        (["--scoring.cost=tests.support.scorers:not_a_number"], "not_a_number' gave nan for a response to the prompt"),
        (["--scoring.cost=tests.support.scorers:too_few"], "must return 4 numbers; got shape (3,)"),
        (["--scoring.reward=tests.support.scorers:raising"], "raised KeyError: 'harm' ("),
        (["--scoring.reward=tests.support.scorers:raising"], "scorers.py:"),
        (["--scoring.reward=tests.support.broken:f"], "cannot import module 'tests.support.broken': NameError"),
        (
            ["--rollout.max_response_tokens=300"],
            "rollout.max_response_tokens=300 leaves no room for a prompt in a context of 256",
        ),
        (
            ["--data.max_prompt_tokens=3"],
            "no prompt is left of 4; dropped: 4 longer than 3 tokens; data.max_prompt_tokens",
        ),
        (
            ["--scoring.cost=tests.support.scorers:hanging", "--scoring.timeout=0.2"],
            "did not return within scoring.timeout",
        ),
        (["--algorithm.cost_limit=.nan"], "algorithm.cost_limit must be finite; got nan"),
        (["--algorithm.dual_clip=.inf"], "algorithm.dual_clip must be finite; got inf"),
        (
            ["--algorithm.kl_placement=reward-and-cost", "--algorithm.method=ppo"],
            "algorithm.kl_placement must be loss or reward with method ppo",
        ),
        (["--algorithm.advantages=gae", "--algorithm.scale_by_std=true"], "algorithm.scale_by_std must be false"),
        (["--ptx.data=nowhere.jsonl"], "prompt file not found: nowhere.jsonl"),
        (["--loggers=[tensorboad]"], "loggers"),
        (
            ["--optimizer.betas=[0.9, 1.5]"],
            "optimizer.betas must be a list of two: a number in [0, 1], a number in [0, 1]; got 1.5",
        ),
        (
            ["--algorithm.kl_estimator=k1", "--algorithm.kl_importance_weighted=false"],
            "algorithm.kl_importance_weighted must be true",
        ),
    ],
)
def test_bad_input_is_one_sentence(more, message, tiny_arguments, tmp_path):
    with pytest.raises(UserError) as error:
        run(tiny_arguments, tmp_path / "run", *more, "--evaluation.prompts=0")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_longer_than_the_context_is_dropped_and_counted(tiny_arguments, tiny_prompts, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(tiny_prompts[0].read_text() + json.dumps({"id": "long", "prompt": "bread " * 400}) + "\n")
    options = [f"--data.train={path}", "--data.max_prompt_tokens=9999", "--evaluation.prompts=0", "--steps=1"]
    folder = run(tiny_arguments, tmp_path / "run", *options)
    assert f"train prompts: 4 of {path}" in capsys.readouterr().out.replace("\n", "")
    assert len(lines(folder)) == 1


def test_an_empty_prompt_list_is_a_sentence(tiny_arguments, tmp_path):
    path = tmp_path / "empty.jsonl"
    path.write_text("\n\n")
    with pytest.raises(UserError, match="no prompts in .*empty.jsonl"):
        run(tiny_arguments, tmp_path / "run", f"--data.train={path}")


def test_held_out_prompts_are_never_trained_on(tiny_arguments, tiny_prompts, tmp_path, capsys):
    with pytest.raises(UserError, match="every prompt is also in data.eval"):
        run(tiny_arguments, tmp_path / "none", f"--data.eval={tiny_prompts[0]}")
    records = [json.loads(line) for line in tiny_prompts[0].read_text().splitlines()]
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records[:2]))
    folder = run(tiny_arguments, tmp_path / "some", f"--data.eval={path}", "--steps=3")
    assert "train prompts: 2 more dropped: they are held out" in capsys.readouterr().out
    assert {s["id"] for s in lines(folder, "samples.jsonl")} == {r["id"] for r in records[2:]}


@pytest.mark.parametrize("when", ["start", "resume"])
def test_a_logger_that_cannot_start_loses_nothing(when, tiny_arguments, tmp_path, monkeypatch):
    def no_network(*_):
        raise ConnectionError("network is down")

    options, out = [*tiny_arguments, "--evaluation.prompts=2", "--steps=1"], tmp_path / "run"
    if when == "resume":
        run(options, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    monkeypatch.setattr("repo.runs.loggers._tensorboard", no_network)
    command = [*options, f"--out={out}"] if when == "start" else ["--resume", str(out), "--steps=2"]
    with pytest.raises(UserError, match="loggers: tensorboard cannot start: ConnectionError: network is down"):
        train.run_command([*command, "--loggers=[tensorboard]"])
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert out.exists() == (when == "resume")


def test_an_existing_folder_is_refused_and_left_alone(tiny_arguments, tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another folder, or continue that run with --resume"):
        run(tiny_arguments, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["kept.txt"]
