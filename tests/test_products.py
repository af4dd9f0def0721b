"""Pairwise products: every pair of values occurs, with few cases, the same each time."""

from itertools import product

import pytest

from tests.support.products import pairs_of, pairwise_cases


def grid(*sizes):
    """All cases of parameters with so many values."""
    return [{f"p{place}": value for place, value in enumerate(values)} for values in product(*map(range, sizes))]


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 3, 4, 5), (6, 3, 4), (2, 2, 2, 2, 2), (7,), (3, 4)])
def test_every_pair_of_values_occurs(sizes):
    cases = grid(*sizes)
    chosen = [cases[number] for number in pairwise_cases(cases)]
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, cases))


def test_a_product_of_three_shrinks_and_one_of_two_stays_whole():
    assert len(pairwise_cases(grid(3, 3, 3))) <= 12
    assert len(pairwise_cases(grid(2, 3, 4, 5))) <= 30
    assert len(pairwise_cases(grid(3, 4))) == 12
    assert len(pairwise_cases(grid(7))) == 7


def test_pairs_that_occur_in_no_case_are_not_asked_for():
    cases = [case for case in grid(3, 3, 3) if not (case["p0"] == 0 and case["p1"] == 2)]
    chosen = [cases[number] for number in pairwise_cases(cases)]
    assert set().union(*map(pairs_of, chosen)) == set().union(*map(pairs_of, cases))


def test_the_choice_is_the_same_each_time():
    cases = grid(4, 3, 5)
    assert pairwise_cases(cases) == pairwise_cases(list(cases))


def test_values_are_told_apart_without_comparing_them():
    values = [{"a": 1}, {"a": 1}]  # neither hashable nor different
    cases = [{"x": x, "y": y, "z": z} for x, y, z in product(values, values, values)]
    assert len(pairwise_cases(cases)) == 4
