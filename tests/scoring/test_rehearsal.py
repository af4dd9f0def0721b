"""Before a run begins its scorers are tried, so that a start that fails leaves no folder, and signs are looked at."""

import fcntl
import json
import sys
import types

import pytest

from repo import train
from repo.common.errors import UserError
from repo.config.schema import ScoringConfig
from repo.data.prompts import Prompt
from repo.runs.folder import is_unused
from repo.scoring.judge import load_judge
from repo.scoring.rehearsal import rehearse
from repo.scoring.scorers import load_scorers
from tests.support.score_models import FUNCTIONS

PROMPTS = [Prompt("a", "What is bread?", "", columns={"answer": 4})]


@pytest.fixture
def named(monkeypatch):
    """Make functions importable as user_module:name."""
    module = types.ModuleType("user_module")
    monkeypatch.setitem(sys.modules, "user_module", module)

    def make(function, name="f"):
        setattr(module, name, function)
        return f"user_module:{name}"

    return make


def warnings(reward=f"{FUNCTIONS}:words", cost=f"{FUNCTIONS}:words", judge="none"):
    scorers = load_scorers(ScoringConfig(reward=reward, cost=cost), None)
    judging = load_judge(judge, None, "cpu", 20.0)
    return rehearse(scorers, judging, {"data.train": PROMPTS, "data.eval": []}, 8)


def words(prompts, responses):
    return [len(r.split()) for r in responses]


def test_a_cost_of_the_wrong_sign_is_told(named):
    reversed_cost = named(lambda prompts, responses: [-n for n in words(prompts, responses)])
    (line,) = warnings(cost=reversed_cost)
    assert line.startswith("scoring.cost 'user_module:f' gave -14 to a harmful answer and -8 to a refusal; is its sign")
    assert warnings(cost={reversed_cost: -1.0}) == []
    (line,) = warnings(judge=reversed_cost)
    assert line.startswith("evaluation.judge 'user_module:f' gave -14 to a harmful answer")


def test_a_reward_of_the_wrong_sign_is_told(named):
    (line,) = warnings(reward=named(lambda prompts, responses: [-n for n in words(prompts, responses)]))
    assert "is its sign right? a higher reward is better" in line


def test_a_manifest_with_a_sign_check_settles_the_sign(named):
    def shorter(prompts, responses):
        return [-n for n in words(prompts, responses)]

    shorter.manifest = {"sign_check": {"prompt": "Say much.", "lower": "One two three.", "higher": "One."}}
    assert warnings(cost=named(shorter)) == []


def test_constant_scores_are_told(named):
    (line,) = warnings(cost=named(lambda prompts, responses: [0.5] * len(responses)))
    assert line == (
        "scoring.cost 'user_module:f' gave 0.5 to a refusal and to a harmful answer alike; does it read the response?"
    )


def test_columns_are_looked_for_in_every_source(named):
    scorers = load_scorers(ScoringConfig(reward=named(lambda p, r, answer: r), cost=f"{FUNCTIONS}:words"), None)
    held_out = [Prompt("b", "And water?", "", columns={"prompt": "And water?"})]
    with pytest.raises(UserError, match="'answer', which is no column of data.eval; it has prompt"):
        rehearse(scorers, None, {"data.train": PROMPTS, "data.eval": held_out}, 8)


def test_a_start_that_fails_leaves_no_folder(options, tmp_path, named):
    out = tmp_path / "run"
    for part in ("--scoring.cost", "--evaluation.judge"):
        more = [f"{part}={named(lambda prompts, responses: responses)}", "--evaluation.prompts=2"]
        with pytest.raises(UserError, match="must return 4 numbers; got list"):
            train.run_command([*options, *more, f"--out={out}"])
        assert not out.exists()


def test_a_folder_without_a_step_is_used_again(options, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def fail(*_):
        raise UserError("no step")

    with monkeypatch.context() as patch:
        patch.setattr("repo.rollout.engine.sample", fail)
        with pytest.raises(UserError, match="no step"):
            train.run_command([*options, f"--out={out}", "--seed=1"])
    assert is_unused(out)
    with (out / "metrics.jsonl").open() as file:  # as a run that is going on
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not is_unused(out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists; choose another folder"):
        train.run_command([*options, f"--out={out}"])
    (out / "notes.txt").unlink()
    train.run_command([*options, f"--out={out}", "--steps=1"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert not is_unused(out)
    with pytest.raises(UserError, match="exists; choose another folder"):
        train.run_command([*options, f"--out={out}"])


def test_columns_reach_the_scorer_in_a_run(tiny_arguments, tmp_path, named):
    seen, data = [], []
    for split in ("train", "eval"):
        file = tmp_path / f"{split}.jsonl"
        rows = [{"prompt": f"{split} {n}?", "answer": f"{split} {n}"} for n in range(3)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data.append(f"--data.{split}={file}")

    def right(prompts, responses, answer):
        seen.extend(zip(prompts, answer, strict=True))
        return words(prompts, responses)

    more = [f"--scoring.reward={named(right)}", "--steps=1", "--evaluation.prompts=2", f"--out={tmp_path / 'run'}"]
    train.run_command([*tiny_arguments, *data, *more])
    assert all(prompt == f"{answer}?" for prompt, answer in seen)
    assert {answer.split()[0] for _, answer in seen} == {"train", "eval"}
