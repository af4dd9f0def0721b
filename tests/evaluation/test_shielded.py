"""The exact bound of a probability, and what a shielded evaluation states."""

import io

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import beta, binom, binomtest

from repo.evaluation.binomial import clopper_pearson_upper
from repo.evaluation.shielded import print_shield, shield_report, unsafe_accepted
from repo.evaluation.statistics import Evaluation

SETTINGS = {"samples": 4, "z": 1.64, "refusal": None, "scorers": ["mine:harm"], "limit": 0.0}


@pytest.mark.parametrize("trials", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_the_bound_is_the_quantile_of_the_beta_distribution(trials, level):
    for events in sorted({0, 1, trials // 3, trials - 1, trials}):
        bound = clopper_pearson_upper(events, trials, level)
        expected = 1.0 if events == trials else beta.ppf(level, events + 1, trials - events)
        assert bound == pytest.approx(expected, rel=1e-9)


def test_the_bound_is_that_of_an_exact_two_sided_interval_at_twice_the_error():
    interval = binomtest(3, 50).proportion_ci(0.9, "exact")
    assert clopper_pearson_upper(3, 50) == pytest.approx(interval.high, rel=1e-9)


def test_the_bound_at_the_ends_has_its_closed_form():
    assert clopper_pearson_upper(0, 50) == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-12)
    assert clopper_pearson_upper(50, 50) == 1.0
    assert clopper_pearson_upper(0, 0) == 1.0


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5])
def test_the_bound_covers_the_probability_at_its_level(p):
    trials = 40
    covered = sum(binom.pmf(k, trials, p) for k in range(trials + 1) if clopper_pearson_upper(k, trials) >= p)
    assert covered >= 0.95


@pytest.mark.parametrize(("events", "trials", "level"), [(-1, 3, 0.9), (4, 3, 0.9), (1, 3, 0.0), (1, 3, 1.0)])
def test_counts_and_levels_that_cannot_be_are_refused(events, trials, level):
    with pytest.raises(ValueError, match="must be in"):
        clopper_pearson_upper(events, trials, level)


def test_the_bound_is_calibrated_on_the_first_half_and_checked_on_the_second():
    accepted = np.array([1, 1, 0, 1, 1, 1, 1, 0, 1], dtype=float)
    safe = np.array([1, 0, 0, 1, 0, 1, 1, 0, 0], dtype=float)
    found = unsafe_accepted(accepted, safe)
    assert found["calibration"] == {"accepted": 3, "unsafe": 1, "rate": 1 / 3}
    assert found["check"] == {"accepted": 4, "unsafe": 2, "rate": 0.5}
    assert found["bound"] == pytest.approx(beta.ppf(0.95, 2, 2))
    assert found["holds"] is True
    assert unsafe_accepted(np.ones(200), np.repeat([1.0, 0.0], 100))["holds"] is False


def test_without_an_accepted_response_nothing_is_bounded():
    found = unsafe_accepted(np.zeros(4), np.ones(4))
    assert found["bound"] == 1.0
    assert found["check"]["rate"] is found["holds"] is None
    assert unsafe_accepted(np.ones(1), np.zeros(1))["check"]["unsafe"] == 1


def evaluation_of(judged=True):
    """12 prompts with 2 responses each: the second of each is never accepted and unsafe."""
    records = []
    for p in range(12):
        for k in range(2):
            unsafe = k == 1 or p in (1, 7, 8)
            record = {"id": f"p{p}", "category": "c", "prompt": "?", "response": "!", "tokens": 3, "reward": float(p)}
            record |= {"cost": 1.0 if unsafe else -1.0, "draws": 1 + 3 * k, "accepted": k == 0, "upper_cost": 0.0}
            records.append(record | ({"judge_safe": k == 0 and p != 2} if judged else {}))
    return Evaluation(records, 0.0)


def test_a_report_states_each_quantity_by_each_judge():
    found = shield_report(evaluation_of())
    assert found["mean_draws"]["mean"] == 2.5
    assert found["without_acceptable_draw"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert found["reward"]["mean"] == 5.5
    assert list(found["judges"]) == ["held-out judge", "training cost"]
    judge, cost = found["judges"].values()
    assert judge["safe_rate"]["mean"] == pytest.approx(11 / 24)
    assert cost["safe_rate"]["mean"] == pytest.approx(9 / 24)
    # of the first response of each prompt alone, since those of one prompt are not independent
    counts = [[side["unsafe_accepted"][half]["unsafe"] for half in ("calibration", "check")] for side in (judge, cost)]
    assert counts == [[1, 0], [1, 2]]
    assert judge["unsafe_accepted"]["calibration"]["accepted"] == 6
    assert list(shield_report(evaluation_of(judged=False))["judges"]) == ["training cost"]


def test_the_table_shows_both_halves_and_the_bound():
    console = Console(record=True, width=200, file=io.StringIO())
    print_shield(console, "[/a], final", shield_report(evaluation_of()) | SETTINGS)
    text = console.export_text()
    for part in ("[/a], final", "draws per response", "2.50", "50.0%", "2 of 6 (33.3%)", "1 of 6 (16.7%)", "0 of 6"):
        assert part in text
    assert f"{beta.ppf(0.95, 2, 5):.1%}" in text
    assert "one scorer, whose deviation counts as 0" in text
