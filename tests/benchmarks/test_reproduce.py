"""The comparison of methods as `make reproduce` makes it, on the tiny model; its statistics."""

import importlib
import json

import numpy as np
import pytest

from benchmarks.reproduce import language
from benchmarks.reproduce.language import METHODS, Seeds, call, main, of_seeds
from repo.common.errors import UserError
from repo.config.fields import field_names
from tests.commands.test_compare import evaluation_of


class InTurn:
    """A pool that runs everything in this thread, which a training needs for its signal handlers."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    map = staticmethod(map)


@pytest.fixture
def in_process(monkeypatch):
    """Commands of the package run in this process, without the seconds that each needs to import it."""

    def run(arguments, threads, log):
        importlib.import_module(arguments[0]).run_command(list(arguments[1:]))

    monkeypatch.setattr(language, "call", run)
    monkeypatch.setattr(language, "ThreadPoolExecutor", InTurn)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_methods_are_trained_evaluated_and_compared(tiny_arguments, tmp_path):
    overrides = [*tiny_arguments, "--steps=2", "--evaluation.prompts=2", "--model.device=cpu"]
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = ["--methods", "ppo_lagrangian", "repo", "--seeds", "0", "1", *places, "--", *overrides]
    main(command)
    results = json.loads((tmp_path / "results" / "reproduce_language.json").read_text())
    assert list(results["methods"]) == ["reference", "ppo_lagrangian", "repo"]
    assert results["prompts"] == 2
    for quantities in results["methods"].values():
        assert quantities["reward"]["low"] <= quantities["reward"]["mean"] <= quantities["reward"]["high"]
    assert len(results["methods"]["repo"]["safe_rate"]["seeds"]) == 2
    assert set(results["against_ppo_lagrangian"]) == {"reference", "repo"}
    assert "| RePO |" in (tmp_path / "results" / "reproduce_language.md").read_text()
    assert (tmp_path / "results" / "reproduce_language.png").read_bytes()[1:4] == b"PNG"
    assert not (tmp_path / "runs" / "repo-0" / "checkpoints").exists()
    written = (tmp_path / "runs" / "repo-0" / "metrics.jsonl").stat().st_mtime_ns
    main(command)  # everything is there
    assert (tmp_path / "runs" / "repo-0" / "metrics.jsonl").stat().st_mtime_ns == written


def test_methods_differ_in_the_method_alone():
    for title, options in METHODS.values():
        assert title
        for option in options:
            name = option.removeprefix("--").split("=")[0]
            assert name in field_names()
            assert name.startswith(("algorithm.", "critic."))
            assert "normalize" not in name


def test_a_command_runs_in_a_process_of_its_own_with_its_threads_and_its_log(tmp_path, monkeypatch):
    (tmp_path / "shows_threads.py").write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "log"
    call(["shows_threads"], 3, log)
    assert log.read_text() == "3\n"
    with pytest.raises(RuntimeError, match="no_such_module failed; the end of .*log: 3\n"):
        call(["no_such_module"], None, log)


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_folder_of_another_configuration_is_refused(tiny_arguments, tmp_path):
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = ["--methods", "ppo", "--seeds", "0", *places, "--", *tiny_arguments, "--evaluation.prompts=2"]
    main([*command, "--steps=1"])
    with pytest.raises(UserError, match="ppo-0 was trained with another configuration"):
        main([*command, "--steps=2"])


def test_an_interval_over_seeds_is_wider_than_one_over_prompts_alone():
    generator = np.random.default_rng(0)
    prompts = generator.normal(0, 0.1, (50, 1))
    of_methods = [[evaluation_of((prompts + shift).tolist()) for shift in shifts] for shifts in ((0, 0, 0), (-1, 0, 1))]
    same, different = (of_seeds(evaluations, "cost") for evaluations in of_methods)
    width = [s.interval["high"] - s.interval["low"] for s in (same, different)]
    assert same.interval["mean"] == pytest.approx(different.interval["mean"])
    assert width[0] < 0.1 < 4 < width[1]
    assert same.minus(same)["low"] == same.minus(same)["high"] == 0


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_methods_that_do_not_differ_are_rarely_told_apart(seeds):
    """Of 400 pairs of equal methods at most one in 20 intervals should leave out 0; 30 is two deviations above."""
    generator, apart = np.random.default_rng(seeds), 0
    for _ in range(400):
        a, b = (Seeds(v, v[:, None] + np.zeros((seeds, 2000))) for v in generator.normal(0, 1, (2, seeds)))
        difference = a.minus(b)
        apart += not difference["low"] <= 0 <= difference["high"]
    assert apart <= 30
