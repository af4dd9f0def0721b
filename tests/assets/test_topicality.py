"""The threshold of topicality: its rule, and that its rows are those that the committed figures were measured on."""

import json

import numpy as np
import pytest

from repo.assets.build import FITTED
from repo.assets.measure import by_kind
from repo.assets.prompts import split_prompts
from repo.assets.rows import Row
from repo.assets.topicality import RULE, mismatched, threshold_of_topic, written_rows
from repo.evaluation.reward_hacking import is_refusal


def test_five_percent_of_mismatched_pairs_pass_in_the_mean_over_sources():
    generator = np.random.default_rng(0)
    others = {"many": generator.normal(0.1, 0.1, 50_000), "few": generator.normal(0.3, 0.1, 1_000)}
    threshold = threshold_of_topic(others)
    assert np.mean([(v >= threshold).mean() for v in others.values()]) == pytest.approx(0.05, abs=1e-3)


def test_replies_to_the_same_prompt_are_no_mismatch():
    rows = [Row("Why?", "a", "x"), Row("why", "b", "x"), Row("How?", "c", "x")]
    cosines = np.arange(9.0).reshape(3, 3)
    assert mismatched(cosines, rows, np.arange(3)).tolist() == [2.0, 5.0, 6.0, 7.0]


@pytest.mark.assets
def test_the_committed_threshold_was_measured_on_written_replies_alone():
    entry = json.loads((FITTED / "judge" / "scorer.json").read_text())["topicality"]
    rows = written_rows()
    assert entry["rule"] == RULE
    assert entry["pairs"] == by_kind(row.kind for row in rows)
    assert not {row.prompt for row in rows if row.kind != "labels"} & {p.prompt for p in split_prompts().eval}
    assert not any(is_refusal(row.reply) for row in rows if row.kind == "labels")
    assert np.mean(list(entry["passing_share_of_mismatched_replies"].values())) == pytest.approx(0.05, abs=1e-3)
