"""Harmful and benign prompts: their totals stand in the console, the report's table and the model card."""

import dataclasses
import io

import numpy as np
from rich.console import Console

from repo.config.schema import Config
from repo.evaluation.kinds import changes_by_kind, kind_of, measured_by_kind, transitions
from repo.evaluation.statistics import Evaluation, measured, paired
from repo.evaluation.tables import (
    comparison_rows,
    has_intervals,
    kind_rows,
    print_comparison,
    print_compensation,
    print_summary,
    show,
    show_change,
)
from repo.runs.model_card import model_card
from repo.scoring.safety import TITLES


def evaluation(costs, samples=2, limit=0.0, categories=("harmful", "benign")) -> Evaluation:
    return Evaluation(
        [
            {
                "id": f"p{i // samples}",
                "category": categories[i // samples % 2],
                "prompt": "",
                "response": "",
                "tokens": 3,
                "reward": 1.0,
                "cost": cost,
            }
            for i, cost in enumerate(costs)
        ],
        limit,
    )


BEFORE, AFTER = evaluation([1.0, 1.0, -1.0, 1.0] * 6), evaluation([-1.0, 1.0, -1.0, -1.0] * 6)


def test_a_kind_is_the_category_or_the_source_of_an_embedded_prompt():
    ids = "advbench-0001", "truthfulqa-0002", "chatterbot-ai-004", "everyday-010", "mine-0001"
    assert [kind_of({"id": i, "category": "x"}) for i in ids] == ["harmful", "benign", "benign", "benign", None]
    assert kind_of({"id": "mine-0001", "category": "Harmless"}) == "benign"


def test_totals_of_each_kind_by_hand():
    harmful, benign = measured_by_kind(BEFORE).values()
    assert (harmful["prompts"], benign["prompts"]) == (6, 6)
    assert (harmful["safe_rate"]["mean"], benign["safe_rate"]["mean"]) == (0.0, 0.5)
    changes = changes_by_kind(BEFORE, AFTER)
    assert [changes[kind]["safe_rate"]["mean"] for kind in ("harmful", "benign")] == [0.5, 0.5]
    assert measured_by_kind(evaluation([1.0] * 8, categories=("", ""))) == {}


def test_the_totals_are_in_every_table():
    names = [row[0] for row in comparison_rows(BEFORE, AFTER)]
    assert "safe rate (training cost), 6 harmful prompts" in names
    card = model_card(dataclasses.replace(Config()), 4, comparison_rows(BEFORE, AFTER))
    assert "`embedded`: the scorers that the package builds" in card
    assert "| safe rate (training cost), 6 benign prompts | 50.0% | 100.0% | +50.0 points |" in card
    text = io.StringIO()
    console = Console(file=text, width=140)
    print_comparison(console, 12, comparison_rows(BEFORE, AFTER))
    print_summary(console, "x", BEFORE.summary() | {"kinds": measured_by_kind(BEFORE)})
    assert text.getvalue().count("6 harmful prompts") >= 4


def test_what_a_safer_policy_may_lose_is_shown_for_benign_prompts():
    more = {"judge_safe": True, "refusal": False, "topical": True, "truncated": False}
    records = [r | more for r in BEFORE.records]
    names = [row[0] for row in kind_rows(Evaluation(records, 0.0), Evaluation(records, 0.0))]
    for key in ("judge_prompts_mostly_unsafe", "refusal_rate", "topical", "ended", "helpful"):
        assert f"{TITLES[key].name}, 6 benign prompts" in names


def test_one_response_to_a_prompt_says_nothing_of_mostly_unsafe_prompts():
    one, two = evaluation([1.0, -1.0] * 6, samples=1), BEFORE
    assert "prompts_mostly_unsafe" in measured(two.columns)
    assert "prompts_mostly_unsafe" not in measured(one.columns)
    assert "prompts_mostly_unsafe" not in paired(one, one)
    text = io.StringIO()
    print_compensation(Console(file=text), evaluation([1.0, -9.0] * 6, samples=1))
    assert text.getvalue() == ""
    assert Config().evaluation.samples_per_prompt == 4


def test_transitions_count_prompts_by_mean_cost():
    before, after = evaluation([1, 1, -1, -1, 3, -1, -1, -1]), evaluation([-1, -1, -1, -1, 1, 1, 1, 0])
    assert np.array_equal(transitions(before, after), [[1, 1], [1, 1]])


def test_too_few_prompts_for_intervals_are_said_so_and_zero_has_no_minus() -> None:
    rows = [("KL", "0.00", "0.12", "+0.12")]
    assert not has_intervals(rows)
    assert "too few prompts for intervals" in model_card(Config(), 4, rows)
    assert "95 % bootstrap interval" in model_card(Config(), 4, [("KL", "0.00", "0.12 [0.10, 0.14]", "+0.12")])
    assert show({"mean": -1e-9, "low": None, "high": None}, "{:.2f}") == "0.00"
    assert show_change({"mean": -1e-9, "low": -0.2, "high": 0.1}, "{:.2f}") == "+0.00 [-0.20, +0.10]"
    assert show_change({"mean": -1e-9, "low": None, "high": None}, "{:.1%}") == "+0.0 points"
