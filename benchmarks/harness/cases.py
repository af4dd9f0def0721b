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
    by --quick, as compiled ways are.
    """

    call: Callable[[], Outputs | object]
    role: str = PEER
    work: float | None = None
    tolerance: float | None = None
    tokens: float | None = None
    compiled: bool = False
    outputs: int | None = None
    slow: bool = False


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
