"""What a training step of each method takes: parts and steps are added up as they were logged."""

import json

import pytest

from benchmarks.workloads import method_steps
from repo.common.errors import UserError


@pytest.fixture
def logged(monkeypatch):
    """Let a run log a slow first step and two more, of which one has a part that the other lacks; return its calls."""
    calls = []

    def done(arguments, threads, log):
        calls.append(arguments)
        run = log.parent / "run"
        run.mkdir()
        scale = 2.0 if "--algorithm.method=cdpo" in arguments else 1.0
        steps = [{"seconds_update": 99.0}, {"seconds_update": 3.0}, {"seconds_update": 5.0, "seconds_rollout": 4.0}]
        rows = [{"reward_mean": 0.5, **{key: value * scale for key, value in step.items()}} for step in steps]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(method_steps, "call", done)
    return calls


def test_parts_are_divided_among_all_timed_steps_and_methods_take_turns(logged, tmp_path, capsys):
    out = tmp_path / "steps.json"
    method_steps.main(["--methods", "repo", "cdpo", "--steps", "2", "--rounds", "2", "--out", str(out), "--", "--a=1"])
    assert ["--algorithm.method=cdpo" in call for call in logged] == [False, True, False, True]
    assert all("--steps=3" in call and "--a=1" in call for call in logged)
    assert [call[-2] for call in logged] == ["--seed=0", "--seed=0", "--seed=1", "--seed=1"]
    methods = json.loads(out.read_text())["methods"]
    assert methods["repo"] == {"seconds": 6.0, "rounds": [6.0, 6.0], "parts": {"update": 4.0, "rollout": 2.0}}
    printed = capsys.readouterr().out
    assert "| constrained DPO | 12.00 [12.00, 12.00] | 2.00 | 8.00 | 4.00 |" in printed


def test_what_cannot_be_measured_or_written_is_refused_before_any_run(logged, tmp_path):
    with pytest.raises(UserError, match="--rounds is 0; it takes a whole number from 1"):
        method_steps.main(["--rounds", "0"])
    with pytest.raises(UserError, match="--out is .*missing/a.json; it takes a file in a folder that exists"):
        method_steps.main(["--out", str(tmp_path / "missing" / "a.json")])
    assert not logged
