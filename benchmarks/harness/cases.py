"""A case as a suite defines it: the ways of doing one thing, and the values that they must agree with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.harness.results import PEER

Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Way:
    """One way of doing the work of a case.

    call: does the work and returns the tensors that are compared with the expected ones, if any are. role, work,
    tokens: as in Row. tolerance: largest error against fp64; None: nothing to compare. compiled: torch.compile made it
    for the sizes it is called with. outputs: how many of the expected tensors it returns, if not all. slow: left out
    by --quick, as compiled ways are. expected: computes in fp64 what this way returns, where that differs from the
    case's. reset: restores an input that the call overwrites; its time does not count.
    """

    call: Callable[[], Outputs | object]
    role: str = PEER
    work: float | None = None
    tolerance: float | None = None
    tokens: float | None = None
    compiled: bool = False
    outputs: int | None = None
    slow: bool = False
    expected: Callable[[], Outputs] | None = None
    reset: Callable[[], None] | None = None


@dataclass(frozen=True)
class Setup:
    """One case, ready to run.

    ways: by name. absent: ways that cannot run, with the reason. subject: the way that the others are divided by.
    expected: computes the outputs in fp64. unit, formula: of the work. notes: further findings; called after the last
    round with the number of timed rounds.
    """

    ways: dict[str, Way]
    subject: str
    unit: str
    formula: str
    absent: dict[str, str] = field(default_factory=dict)
    expected: Callable[[], Outputs] | None = None
    notes: Callable[[int], dict[str, str]] = lambda rounds: {}


def disagreement(name: str, way: Way, expected: Outputs) -> tuple[float, str | None]:
    """Call a way and return (its error, why it is too large or None)."""
    outputs = way.expected() if way.expected else expected[: way.outputs]
    found = error(way.call(), outputs)
    if way.tolerance is None or found <= way.tolerance:
        return found, None
    return found, f"{name} differs from fp64 by {found:.1e}, more than {way.tolerance:.0e}"


def failure(problem: Exception) -> str:
    """Return the reason of a row whose way raised an exception."""
    lines = str(problem).strip().splitlines() or [""]
    return f"fails: {type(problem).__name__}: {lines[0][:120]}"


def error(got: Outputs, expected: Outputs) -> float:
    """Return the largest relative L2 error of the outputs, or NaN if any of them is NaN.

    The error of a scalar is absolute, because its terms are of size 1 and cancel.

    Raises:
        ValueError: if the number of outputs or their shapes differ.
    """
    if [a.shape for a in got] != [b.shape for b in expected]:
        raise ValueError(f"{len(got)} outputs of other shapes than the {len(expected)} expected")
    errors = []
    for a, b in zip(got, expected, strict=True):
        difference = (a.double() - b.double()).norm()
        errors.append((difference if b.ndim == 0 else difference / b.double().norm()).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)
