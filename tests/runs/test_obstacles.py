"""A run from which nothing can be learned says so in one line, in the console and in the report."""

import dataclasses

import pytest
from rich.console import Console

from repo import train
from repo.config.schema import BOUNDED, DUAL_EVERY, PAIRED, AlgorithmConfig, Config, PenaltyConfig
from repo.reporting.document import write_report
from repo.runs.console import Display
from repo.runs.obstacles import FEWEST, obstacles

FINE = {"safe_rate": 0.5, "lam": 2.0, "truncated": 0.5}


def found(method="repo", advantages=(0.5, -0.5), steps=FEWEST, cap=10.0, **metrics):
    config = dataclasses.asdict(Config(penalty=PenaltyConfig(max=cap)))
    config["algorithm"]["method"] = method
    records = [{"step": i, **FINE, **metrics} for i in range(steps)]
    samples = [{"step": i, "id": "a", "advantage": a} for i in range(steps) for a in advantages]
    return obstacles(config, records, samples)


def test_a_run_that_learns_has_none():
    assert found() == {}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"safe_rate": 1.0}, "never binds", "this is plain PPO. Is the cost's sign or the limit right?"),
        ({"safe_rate": 0.0}, "nothing safe", "no response of 4 steps is within the limit d = 0"),
        ({"advantages": (0.0, 0.0)}, "no spread", "in 100% of the groups"),
        ({"lam": 10.0}, "lambda at its cap", "penalty.max = 10"),
        ({"truncated": 0.99}, "cut off", "99% of the responses of 4 steps are cut off at rollout.max_response_tokens"),
    ],
)
def test_each_obstacle_is_one_sentence_once_enough_steps_show_it(change, kind, words):
    assert list(found(**change)) == [kind]
    assert words in found(**change)[kind]
    assert found(steps=FEWEST - 1, **change) == {}


def test_ppo_has_no_constraint_to_bind_and_old_records_lack_keys():
    assert found(method="ppo", safe_rate=1.0, lam=0.0) == {}
    assert found(truncated=None, advantages=(None, None)) == {}


def test_console_and_report_say_it_once(options, tmp_path, capsys):
    run = tmp_path / "run"
    more = ["--algorithm.cost_limit=40", "--steps=6", "--evaluation.prompts=0", f"--out={run}"]
    train.run_command([*options, *more])
    told = capsys.readouterr().out
    assert told.count("this is plain PPO") == 1
    assert "this is plain PPO" in write_report(run).read_text()


@pytest.mark.parametrize(
    ("method", "mode", "told"),
    [
        ("repo", "rectified", True),
        ("repo", "split", True),
        ("crpo", "rectified", True),
        ("repo", "barrier", False),
        *((method, "rectified", False) for method in ("interior_point", "ppo_lagrangian", "fixed_penalty", *PAIRED)),
    ],
)
def test_a_method_that_acts_within_the_limit_is_not_called_plain_ppo(method, mode, told):
    config = {"algorithm": {"method": method, "cost_mode": mode, "cost_limit": 0.0}, "penalty": {"max": 3.0}}
    records = [{"safe_rate": 1.0, "lam": 3.0}] * 4
    assert ("never binds" in obstacles(config, records, [])) == told
    assert ("lambda at its cap" in obstacles(config, records, [])) == (method in BOUNDED)


def on_pairs(steps, **metrics):
    """The lines of a run on pairs, which samples the policy in every fifth step."""
    unknown = dict.fromkeys(("safe_rate", "truncated"))
    return [{"step": i, "lam": 1.0} | (metrics if i % DUAL_EVERY == DUAL_EVERY - 1 else unknown) for i in range(steps)]


def test_steps_that_do_not_sample_the_policy_say_nothing_of_it():
    config = {"algorithm": {"method": "repo_dpo", "cost_limit": 0.0}, "penalty": {"max": 1.0}}
    sampled = {"safe_rate": 0.0, "truncated": 1.0}
    assert obstacles(config, on_pairs(19, **sampled), []) == {}  # three samples
    found = obstacles(config, on_pairs(20, **sampled), [])
    assert list(found) == ["nothing safe", "lambda at its cap", "cut off"]
    assert "no response of 4 steps" in found["nothing safe"]


def test_the_console_remembers_enough_steps_to_speak_of_pairs(capsys):
    config = Config(steps=40, algorithm=AlgorithmConfig(method="cdpo"))
    display = Display(Console(width=200), config, 0)
    for record in on_pairs(20, safe_rate=0.0, truncated=0.5):
        display._obstacles(record, [])
    assert "note: no response of 4 steps is within the limit" in capsys.readouterr().out
