"""The one definition of safe: the same for numbers, arrays and tensors, and at the limit itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from repo.scoring.safety import (
    TITLES,
    compensation_gap,
    compensation_sentence,
    describe_compensation,
    is_safe,
    mostly_unsafe,
    rectified_cost,
    round_limit,
    summarize,
)

COST = st.floats(-50, 50, width=32)
EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)


@given(st.lists(COST, min_size=1, max_size=9), COST)
def test_numbers_arrays_and_tensors_agree(costs, limit):
    tensor, array = torch.tensor(costs, dtype=torch.float64), np.array(costs)
    assert is_safe(tensor, limit).tolist() == is_safe(array, limit).tolist() == [is_safe(c, limit) for c in costs]
    expected = [float(rectified_cost(c, limit)) for c in costs]
    assert rectified_cost(tensor, limit).tolist() == rectified_cost(array, limit).tolist() == expected
    assert all((hinge == 0) == is_safe(c, limit) for c, hinge in zip(costs, expected, strict=True))


def test_a_cost_at_a_limit_that_fp32_rounds_is_safe():
    assert round_limit(0.1) != 0.1
    at_the_limit = torch.tensor([0.1], dtype=torch.float32)
    assert is_safe(at_the_limit, 0.1).all()
    assert is_safe(at_the_limit.double(), 0.1).all()
    assert rectified_cost(at_the_limit.double(), 0.1).item() == 0


def test_rectified_costs_keep_their_dtype():
    for dtype in (torch.float32, torch.float64):
        assert rectified_cost(torch.zeros(2, dtype=dtype), 0.5).dtype == dtype


@given(st.lists(EIGHTHS, min_size=1, max_size=8), EIGHTHS)
def test_the_gap_is_0_exactly_where_nothing_compensates(costs, limit):
    values = torch.tensor(costs, dtype=torch.float64)
    gap = compensation_gap(rectified_cost(values, limit).mean(), values.mean(), limit).item()
    one_sided = bool(is_safe(values, limit).all()) or not bool((values < limit).any())
    assert gap >= -1e-12
    assert (gap < 1e-9) == one_sided


def test_half_of_the_responses_unsafe_is_not_mostly():
    assert mostly_unsafe(np.array([0.0, 0.49, 0.5, 1.0])).tolist() == [True, True, False, False]
    summary = summarize(torch.zeros(6), torch.tensor([1.0, -1, 1, 1, -1, 1]), torch.tensor([0, 0, 1, 1, 1, 2]), 0.0)
    assert summary["prompts_mostly_unsafe"] == pytest.approx(2 / 3)


def test_the_sentence_is_said_only_where_the_mean_hides_something():
    assert compensation_sentence(-0.1, 0.0, 0.25) == "mean constraint met (E[C] = -0.100 <= 0), 25.0% of prompts unsafe"
    assert compensation_sentence(0.1, 0.0, 0.25) is None
    assert compensation_sentence(-0.1, 0.0, 0.0) is None


def test_a_report_says_what_the_mean_hides():
    costs = torch.tensor([-3.0, 1.0, 1.0], dtype=torch.float64)
    hidden = describe_compensation(["a", "b", "c"], costs, 0.0, "held out")
    assert hidden.hidden
    assert hidden.sentence == (
        "Mean constraint met, 66.7% of responses unsafe (E[C] = −0.333, d = 0; 3 responses held out)."
    )
    unmet = describe_compensation(["a", "a", "b"], costs + 3, 0.0, "now")
    assert not unmet.hidden
    assert "Mean constraint not met, 50.0% of prompts unsafe in more than half of their responses" in unmet.sentence
    safe = describe_compensation(["a"], torch.tensor([0.0], dtype=torch.float64), 0.0, "now")
    assert safe.sentence == "Mean constraint met (E[C] = 0.000, d = 0), and all 1 responses now are within the limit."


def test_every_title_has_a_form_that_writes_numbers():
    assert all(title.form.format(0.5) and title.name for title in TITLES.values())
