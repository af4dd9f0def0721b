"""Runs of an experiment: resumed, told with what they took, and done one after another."""

from dataclasses import replace

import pytest

from benchmarks.reproduce import runs
from benchmarks.reproduce.runs import Usage, call, in_turn, train, usage_of
from repo.config.parse import make_parser, parse_config, to_yaml


def test_what_a_resumed_run_took_adds_up(tmp_path, monkeypatch):
    run, calls = tmp_path / "seed-1", []

    def done(arguments, threads, log):
        calls.append(arguments)
        if len(calls) == 1:
            (run / "checkpoints").mkdir(parents=True)
            config = parse_config(make_parser("", ""), ["--seed=1"])
            (run / "config.yaml").write_text(to_yaml(replace(config, out=str(run))))
            return Usage(2.0, 5)
        (run / "final").mkdir()
        return Usage(3.0, 4)

    monkeypatch.setattr(runs, "call", done)
    with pytest.raises(RuntimeError, match="seed-1 was stopped before its end; the same command continues it"):
        train(run, ["--seed=1"], None)
    assert (run / "checkpoints").exists()
    train(run, ["--seed=1"], None)
    assert calls == [["repo.train", "--seed=1", f"--out={run}"], ["repo.train", "--resume", str(run)]]
    assert usage_of(run) == Usage(5.0, 5)
    assert not (run / "checkpoints").exists()
    train(run, ["--seed=1"], None)
    assert len(calls) == 2


@pytest.mark.usefixtures("one_thread")
def test_after_a_failure_no_further_run_begins(capsys):
    begun = []

    def fails():
        begun.append("b")
        raise RuntimeError("no memory")

    tasks = {"a": lambda: begun.append("a"), "b": fails, "c": lambda: begun.append("c")}
    with pytest.raises(RuntimeError, match="no memory"):
        in_turn(1, tasks, ready={"a"})
    assert begun == ["a", "b"]
    assert "3 runs, 1 there already; 1 at a time" in capsys.readouterr().out


def test_the_estimate_counts_the_runs_that_are_left(capsys):
    assert in_turn(2, {name: lambda: 1 for name in "abc"}) == {"a": 1, "b": 1, "c": 1}
    assert "3 of 3 done, 0 min left" in capsys.readouterr().out


def test_a_command_runs_in_a_process_of_its_own_with_its_threads_and_its_log(tmp_path, monkeypatch):
    (tmp_path / "shows_threads.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    used = call(["shows_threads"], 3, log)
    assert used.bytes > 2**20
    assert 0 < used.minutes < 5
    assert log.read_text() == "3\n"
    with pytest.raises(RuntimeError, match="no_such_module failed; the end of .*log: 3\n"):
        call(["no_such_module"], None, log)
