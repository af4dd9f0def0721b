"""What a suite hands over to be measured: the ways of doing one thing, and what they must agree with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.results import PEER

Outputs = Sequence[Tensor]


@dataclass(frozen=True)
class Way:
    """One way. call: does the work; returns the tensors to compare with the expected ones, if it is checked. role: of a
    Row. work: in the case's unit. tolerance: largest error against fp64; None: nothing to compare. compiled: it is
    compiled for the sizes of its first call. slow: left out by --quick, as what is compiled is."""

    call: Callable[[], Outputs | object]
    role: str = PEER
    work: float | None = None
    tolerance: float | None = None
    tokens: float | None = None
    compiled: bool = False
    slow: bool = False


@dataclass(frozen=True)
class Setup:
    """One case, ready to run. ways: by name; absent: those that cannot run, with the reason. subject: the way that the
    others are divided by. expected: the outputs in fp64. unit, formula: of the work. notes: asked for after the last
    round."""

    ways: dict[str, Way]
    subject: str
    unit: str
    formula: str
    absent: dict[str, str] = field(default_factory=dict)
    expected: Callable[[], Outputs] | None = None
    notes: Callable[[], dict[str, str]] = dict


def error(got: Outputs, expected: Outputs) -> float:
    """Largest relative L2 error of the outputs; absolute for a scalar, whose terms are of size 1 and cancel.

    Fewer outputs than expected are compared as far as they go (a frozen head has no gradient).
    """
    errors = []
    for a, b in zip(got, expected, strict=False):
        difference = (a.double() - b.double()).norm()
        errors.append((difference if b.ndim == 0 else difference / b.double().norm()).item())
    return max(errors)
