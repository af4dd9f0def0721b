"""The comparison of methods as `make reproduce` makes it, on the tiny model; its statistics."""

import json
import shutil

import numpy as np
import pytest

from benchmarks.reproduce import matching
from benchmarks.reproduce.language import SHARED, by_kind, main, spent
from benchmarks.reproduce.language_report import UNSAFE, draw, kind_lines, spent_rows
from benchmarks.reproduce.methods import METHODS, NEIGHBOURS
from benchmarks.reproduce.over_seeds import Seeds, of_seeds
from benchmarks.reproduce.records import Record
from benchmarks.reproduce.runs import RESULTS
from repo.common.errors import UserError
from repo.config.parse import load_config, make_parser, parse_config
from repo.evaluation.kinds import of_kind
from repo.scoring.safety import TITLES
from tests.commands.test_compare import evaluation_of


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_methods_are_trained_evaluated_and_compared(tiny_arguments, tmp_path, capsys):
    overrides = [*tiny_arguments, "--steps=1", "--model.device=cpu"]
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = ["--methods", "ppo_lagrangian", "repo", "--seeds", "0", *places, "--", *overrides]
    main(command)
    assert "matched1-0: " in capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "reproduce_language.json").read_text())
    assert list(results["methods"]) == ["reference", "ppo_lagrangian", "repo", "matched"]
    assert results["prompts"] > 1  # all that are held out
    assert not (tmp_path / "runs" / "repo-0" / "eval" / "before.json").exists()
    for quantities in results["methods"].values():
        assert quantities["reward"]["low"] <= quantities["reward"]["mean"] <= quantities["reward"]["high"]
    assert len(results["methods"]["repo"]["safe_rate"]["seeds"]) == 1
    assert results["against"]["method"] == "ppo_lagrangian"
    assert set(results["against"]["methods"]) == {"reference", "repo", "matched"}
    limit = results["matched"]["rounds"][0]["limit"]
    assert limit == pytest.approx(results["matched"]["target"], abs=1e-3)
    assert load_config(tmp_path / "runs" / "matched1-0" / "config.yaml").algorithm.cost_limit == limit
    evaluated = json.loads((tmp_path / "runs" / "matched1-0" / "eval" / "final.json").read_text())
    assert evaluated["cost_limit"] == results["cost_limit"] == -0.3  # the default's, whatever a method was trained with
    assert "| RePO |" in (tmp_path / "results" / "reproduce_language.md").read_text()
    assert (tmp_path / "results" / "reproduce_language.png").read_bytes()[1:4] == b"PNG"
    assert not (tmp_path / "runs" / "repo-0" / "checkpoints").exists()
    written = (tmp_path / "runs" / "repo-0" / "metrics.jsonl").stat().st_mtime_ns
    main(command)  # everything is there
    assert "2 runs, 2 there already" in capsys.readouterr().out
    assert (tmp_path / "runs" / "repo-0" / "metrics.jsonl").stat().st_mtime_ns == written
    of_records = continued_from_records(command, tmp_path)
    assert "2 runs, 2 there already" in capsys.readouterr().out
    assert of_records["methods"] == results["methods"]
    assert of_records["matched"] == results["matched"]
    assert sum(of_records["machines"].values()) == 3


def continued_from_records(command, tmp_path):
    """The results of a command whose runs are gone, from their records."""
    (tmp_path / "records").mkdir()
    for file in (tmp_path / "runs").glob("*-0.json"):
        file.rename(tmp_path / "records" / file.name)
    (tmp_path / "runs" / "reference.json").rename(tmp_path / "records" / "reference.json")
    shutil.rmtree(tmp_path / "runs")
    main(["--records", str(tmp_path / "records"), *command])
    return json.loads((tmp_path / "results" / "reproduce_language.json").read_text())


def test_methods_differ_in_their_options_alone():
    for name, method in METHODS.items():
        fields = [option.removeprefix("--").split("=")[0] for option in method.options]
        parse_config(make_parser("", ""), list(method.options))
        beside = {"barrier": ["algorithm.cost_mode", "algorithm.barrier_tau"], "redistributed": ["algorithm.credit"]}
        beside |= {key: ["algorithm.method", "rollout.prompts_per_step"] for key in ("cdpo", "repo_dpo")}
        assert name == "paper" or fields == beside.get(name, ["algorithm.method"])


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_neighbours_are_compared_on_one_figure_with_what_they_took(tiny_arguments, tmp_path):
    overrides = [*tiny_arguments, "--steps=5", "--model.device=cpu", "--save_every=0"]
    overrides += ["--evaluation.judge=tests.support.scorers:not_e"]
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    main(["--neighbours", "--seeds", "0", *places, "--", *overrides])
    results = json.loads((tmp_path / "results" / "neighbours.json").read_text())
    assert list(results["methods"]) == ["reference", *NEIGHBOURS]
    assert results["matched"] is None
    assert results["against"]["method"] == "repo"
    assert set(results["against"]["methods"]) == {"reference", *NEIGHBOURS} - {"repo"}
    for method in NEIGHBOURS:
        text = (tmp_path / "runs" / f"{method}-0" / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert results["spent"][method]["tokens"] == sum(r.get("pair_tokens", r.get("response_tokens")) for r in lines)
        minutes = sum(v for r in lines for k, v in r.items() if k.startswith("seconds_")) / 60
        assert results["spent"][method]["minutes"] == pytest.approx(minutes)
    text = (tmp_path / "results" / "neighbours.md").read_text()
    assert "| response tokens learned from |  | " in text
    assert "(neighbours.png)" in text
    assert "Differences from RePO, on the same prompts:" in text
    (axes,) = draw(results, UNSAFE, 1).axes
    assert axes.get_xlabel() == TITLES["judge_prompts_mostly_unsafe"].name
    assert axes.get_ylabel() == TITLES["reward"].name
    for quantities in results["methods"].values():
        del quantities["judge_prompts_mostly_unsafe"]
    (axes,) = draw(results, UNSAFE, 1).axes  # without a judge
    assert axes.get_xlabel() == TITLES["prompts_mostly_unsafe"].name
    with pytest.raises(SystemExit):
        main(["--neighbours", "--methods", "repo"])


def test_a_further_round_moves_the_limit_by_what_the_last_one_missed():
    assert matching.next_limit(-0.5, []) == -0.5
    assert matching.next_limit(-0.5, [{"limit": -0.5, "reached": -0.3}]) == -0.7


def test_what_is_left_unsafe_at_the_same_mean_cost_is_a_ratio():
    ours = [evaluation_of([[-1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [-1.0, -1.0]] * 5)]
    theirs = [evaluation_of([[-2.0, -2.0], [0.5, 0.5], [0.5, 0.5], [-1.0, -1.0]] * 5)]
    found = matching.compare(ours, theirs)
    assert found["ratio"] == 2.0
    assert found["beyond_twice"]["low"] < found["beyond_twice"]["mean"] == 0.0 < found["beyond_twice"]["high"]
    assert found["is_matched"]
    assert not matching.compare(ours, [evaluation_of([[1.0, 1.0]] * 20)])["is_matched"]
    assert matching.compare([evaluation_of([[-1.0, -1.0]] * 20)], theirs)["ratio"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_a_folder_of_another_configuration_is_refused(tiny_arguments, tmp_path):
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = ["--methods", "ppo", "--seeds", "0", *places, "--", *tiny_arguments]
    main([*command, "--steps=1"])
    with pytest.raises(UserError, match="^--records: .*ppo-0.json is of another configuration"):
        main([*command, "--steps=2"])


RECORDS = [f for f in sorted((RESULTS / "reproduce_language").glob("*-*.json")) if f.stem.rpartition("-")[0] in METHODS]


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_a_committed_record_is_of_the_methods_as_they_are(file, tmp_path):
    name, _, seed = file.stem.rpartition("-")
    options, record = [*SHARED, *METHODS[name].options, f"--seed={seed}"], Record.read(file)
    record.require(file, options, record.scored)
    content = json.loads(file.read_text(encoding="utf-8"))
    del (
        content["config"]["algorithm"]["dual_clip"],
        content["config"]["keep"],
    )  # as if they were newer, at their default
    older = tmp_path / file.name
    older.write_text(json.dumps(content))
    Record.read(older).require(older, options, record.scored)
    content["config"]["algorithm"]["beta"] += 0.01
    older.write_text(json.dumps(content))
    with pytest.raises(UserError, match="is of another configuration"):
        Record.read(older).require(older, options, record.scored)


def test_harmful_and_benign_prompts_are_measured_apart():
    files = [RESULTS / "reproduce_language" / f"repo-{seed}.json" for seed in (0, 1)]
    evaluations = [Record.read(file).evaluation for file in files]
    found, wanted = by_kind({"repo": evaluations}), {"harmful": [], "benign": []}
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        refused = np.reshape(content["column refusal"], (len(content["id"]), -1)).mean(1)
        harmful = np.array([name.startswith("advbench") for name in content["id"]])
        wanted["harmful"].append(refused[harmful].mean())
        wanted["benign"].append(refused[~harmful].mean())
    for kind, rates in wanted.items():
        assert found[kind]["prompts"] == 110
        assert found[kind]["methods"]["repo"]["refusal_rate"]["seeds"] == pytest.approx(rates)
    assert wanted["harmful"][0] > wanted["benign"][0] + 0.1  # they are not the same prompts
    lines = kind_lines(found)
    assert [line for line in lines if "alone" in line] == [f"The 110 {kind} prompts alone:" for kind in wanted]
    shown = [float(line.split("|")[2].split("%")[0]) for line in lines if line.startswith("| refusals |")]
    assert shown == pytest.approx([100 * np.mean(rates) for rates in wanted.values()], abs=0.051)
    alone = [of_kind(evaluation, "benign") for evaluation in evaluations]
    assert by_kind({"repo": alone}) == {}


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


def test_a_run_beside_other_work_does_not_make_its_method_slow():
    """The minutes are the median, 12; the mean is 34. Records of earlier versions have no tokens."""
    runs = [Record({}, [], "", minutes, 0.0, None, tokens) for minutes, tokens in ((10, 300), (80, None), (12, 320))]
    assert spent(runs) == {"minutes": 12.0, "tokens": 310.0, "counted": 2}


def test_tokens_of_some_seeds_alone_are_marked():
    methods = {name: {"reward": {"seeds": [0.0] * 5}} for name in ("reference", "repo", "cdpo")}
    known = {"minutes": 9.96, "tokens": 30000.4, "counted": 4}
    minutes, tokens = spent_rows(methods, {"repo": known, "cdpo": known | {"tokens": None, "counted": 0}})
    assert minutes == "| minutes of training, median of the seeds |  | 10.0 | 10.0 |"
    assert tokens == "| response tokens learned from |  | 30000 (4 of 5 seeds) |  |"
