"""Intervals, summaries and files."""

import json
import math
import subprocess
import sys

import pytest
import torch

from repo.common.errors import UserError
from repo.common.files import replace_folder, write_folder, write_text
from repo.evaluation.statistics import Evaluation, measured, paired
from repo.runs.console import duration
from repo.runs.json_lines import JsonLines
from repo.scoring.safety import summarize


def evaluation_of(values, samples: int = 1, limit: float = 0.0, **more) -> Evaluation:
    """Responses with the costs `values`, `samples` in a row for each prompt; more: further columns."""
    rows = [
        {"id": str(i // samples), "category": "c", "reward": 0.0, "cost": float(v), "tokens": 1}
        for i, v in enumerate(values)
    ]
    for key, column in more.items():
        for row, value in zip(rows, column, strict=True):
            row[key] = value
    return Evaluation(rows, limit)


def test_bootstrap_interval_covers_the_mean_at_its_level():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        found = measured(evaluation_of(torch.randn(60, generator=generator, dtype=torch.float64)).columns)["cost"]
        covered += found["low"] <= 0 <= found["high"]
    assert 180 <= covered <= 198


def test_bootstrap_resamples_prompts_not_responses():
    values = [0.0] * 200 + [1.0] * 200  # 10 prompts, 40 identical responses each
    assert measured(evaluation_of(values, 40).columns)["cost"]["low"] <= 0.2
    assert measured(evaluation_of(values, 1).columns)["cost"]["low"] > 0.4


def test_summary_of_a_batch_where_compensation_hides_unsafe_prompts():
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0])
    costs = torch.tensor([-3.0, -3.0, 1.0, 3.0])
    found = summarize(rewards, costs, torch.tensor([0, 0, 1, 1]), cost_limit=0.0)
    assert found["cost_mean"] == -0.5
    assert found["safe_rate"] == 0.5
    assert found["rectified_cost"] == found["compensation_gap"] == 1.0
    assert found["prompts_mostly_unsafe"] == 0.5
    assert found["reward_safe_mean"] == 1.5
    assert found["cost_max"] == 3.0


def test_without_a_safe_response_their_mean_reward_is_unknown():
    found = summarize(torch.ones(2), torch.ones(2), torch.tensor([0, 0]), 0.0)
    assert math.isnan(found["reward_safe_mean"])
    assert found["safe_rate"] == 0.0


def test_shares_of_topical_and_ended_responses_by_hand():
    topical, truncated = [True, True, False, True], [False, True, False, True]
    found = measured(evaluation_of([0.0] * 4, 2, topical=topical, truncated=truncated).columns)
    assert [found[key]["mean"] for key in ("topical", "ended", "helpful")] == [0.75, 0.5, 0.25]


def test_perplexity_is_the_median_over_responses_that_have_tokens():
    perplexities, tokens = [2.0, 8.0, 3.0, 1e30, 5.0], [2, 1, 4, 3, 0]
    logps = [-n * math.log(p) for n, p in zip(tokens, perplexities, strict=True)]
    even = evaluation_of([0.0] * 5, tokens=tokens, ref_logp=logps)
    assert measured(even.columns)["perplexity"]["mean"] == pytest.approx((3 + 8) / 2)
    odd = Evaluation([r for r in even.records if r["ref_logp"] != logps[0]], 0.0)
    assert measured(odd.columns)["perplexity"]["mean"] == pytest.approx(8)
    none = Evaluation([r for r in even.records if r["tokens"] == 0], 0.0)
    assert measured(none.columns)["perplexity"] == {"mean": None, "low": None, "high": None}


def test_the_interval_of_perplexity_resamples_prompts():
    logps = [-math.log(2 + i // 4) for i in range(80)]  # each prompt's four responses have one perplexity, 2 ... 21
    evaluation = evaluation_of([0.0] * 80, 4, ref_logp=logps)
    found = measured(evaluation.columns)["perplexity"]
    assert found["mean"] == pytest.approx(11.5)
    assert found["low"] < 9 < 14 < found["high"]
    worse = evaluation_of([0.0] * 80, 4, ref_logp=[2 * x for x in logps])
    assert paired(evaluation, worse)["perplexity"]["low"] > 0


def test_an_evaluation_from_before_these_quantities_is_read_and_compared():
    new = {"topical": [True] * 20, "truncated": [False] * 20, "ref_logp": [-1.0] * 20}
    names = {"topical", "ended", "helpful", "perplexity"}
    now, old = evaluation_of([0.0] * 20, 2, **new), evaluation_of([0.0] * 20, 2, truncated=new["truncated"])
    assert set(measured(now.columns)) >= names
    assert set(measured(old.columns)) & names == set(paired(old, now)) & names == {"ended"}
    assert [old.has(key) for key in ("ended", "helpful", "cost")] == [True, False, True]


def test_json_lines_are_cut_back_to_the_offset(tmp_path):
    file = JsonLines(tmp_path / "a.jsonl")
    file.write({"a": 1, "b": float("nan")})
    offset = file.sync()
    file.write({"a": 2})
    file.close()
    again = JsonLines(tmp_path / "a.jsonl", offset)
    again.write({"a": 3})
    again.close()
    assert [json.loads(x) for x in (tmp_path / "a.jsonl").read_text().splitlines()] == [{"a": 1, "b": None}, {"a": 3}]


def test_a_failed_write_leaves_the_previous_folder(tmp_path):
    target = tmp_path / "final"
    write_folder(target, lambda f: (f / "a").write_text("old"))

    def full_disk(folder):
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    def full_disk_in_torch(folder):
        (folder / "a").write_text("new")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    for write, message in ((full_disk, "No space left on device"), (full_disk_in_torch, "PytorchStreamWriter failed")):
        with pytest.raises(UserError, match=message):
            write_folder(target, write)
        assert (target / "a").read_text() == "old"
        assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_failed_rename_brings_the_old_folder_back(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(OSError, match="No such file"):
        replace_folder(tmp_path / "not there", tmp_path / "final")
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_cost_at_the_limit_is_safe_everywhere():
    costs, group = torch.tensor([0.1, 0.1]), torch.tensor([0, 0])  # fp32(0.1) > 0.1
    found = summarize(torch.ones(2), costs, group, cost_limit=0.1)
    assert found["safe_rate"] == 1.0
    assert found["rectified_cost"] == 0.0
    overall = evaluation_of(costs.tolist(), 2, limit=0.1).summary()["overall"]
    assert overall["safe_rate"]["mean"] == 1.0
    assert overall["compensation_gap"]["mean"] == 0.0


def test_small_files_are_replaced_whole(tmp_path):
    write_text(tmp_path / "latest", "one")
    write_text(tmp_path / "latest", "two")
    assert (tmp_path / "latest").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_durations_are_readable():
    assert [duration(s) for s in (4, 125, 3723)] == ["0:04", "2:05", "1:02:03"]


def test_the_command_prints_one_line_and_no_traceback():
    command = [sys.executable, "-m", "repo.train", "--optimzer.lr=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown configuration key 'optimzer.lr'; did you mean 'optimizer.lr'?"
    assert done.stdout == ""


def test_help_lists_every_field_with_its_docstring():
    done = subprocess.run([sys.executable, "-m", "repo.train", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    from repo.config.fields import field_names

    assert all(f"--{name} " in text for name in field_names())
    assert "--dry-run" in text
    assert "--resume RUN" in text
