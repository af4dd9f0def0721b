"""Choose, of a test's product of parameters, few cases in which every pair of values still occurs."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest


def pairs_of(case: Mapping[str, Any]) -> set[tuple[tuple[str, int], ...]]:
    """Return the pairs of (parameter, identity of its value) in a case; of a single parameter, that one alone."""
    return set(combinations(((name, id(case[name])) for name in sorted(case)), min(2, len(case))))


def pairwise_cases(cases: Sequence[Mapping[str, Any]]) -> list[int]:
    """Choose cases until every pair of values of two parameters that occurs in a case occurs in a chosen one.

    Greedy: each choice is the first case with the most pairs that are still missing.

    Args:
        cases: the value of each parameter, by its name. Values are told apart by identity.

    Returns:
        Indices into `cases`, ascending; the same for the same cases.
    """
    pairs = [pairs_of(case) for case in cases]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(missing & pairs[number]))
        missing -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def parameters_of(item: pytest.Function) -> dict[str, Any]:
    """Values of a test's parameters by name."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def is_left_out(item: pytest.Function) -> bool:
    """Tell whether the condition of a `leave_out` mark holds for a test's parameters."""
    parameters = parameters_of(item)
    for mark in item.iter_markers("leave_out"):
        (condition,) = mark.args
        if condition(**{name: parameters[name] for name in inspect.signature(condition).parameters}):
            return True
    return False


def reduce_products(items: list[pytest.Function]) -> list[pytest.Function]:
    """Drop the cases that tests leave out; mark as `long` what `pairwise` tests do not need for every pair."""
    kept = [item for item in items if not is_left_out(item)]
    tests: dict[str, list[pytest.Function]] = defaultdict(list)
    for item in kept:
        if item.get_closest_marker("pairwise") and parameters_of(item):
            tests[item.nodeid.split("[")[0]].append(item)
    for cases in tests.values():
        chosen = set(pairwise_cases([parameters_of(item) for item in cases]))
        for number, item in enumerate(cases):
            if number not in chosen:
                item.add_marker("long")
    return kept
