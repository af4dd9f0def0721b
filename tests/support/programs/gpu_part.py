"""A part of `make gpu` whose ways do everything that a peer may do: agree, differ, raise, end the process, hang."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from benchmarks.gpu.plan import Plan
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.results import LIMIT, OURS

NAME = "losses"
SUBJECT = "ours"
PEAKS = False


def cases(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return two sizes, one of which cannot be set up."""
    return {"small": {"size": 3}, "too large": {"size": -1}} if plan.few else {"small": {"size": 3}}


def small(parameters: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the parameters as they are; what cannot be set up is as small as the other."""
    return {"size": abs(parameters["size"])}


def setup(size: int) -> Setup:
    """Set up all ways; negative sizes fail."""
    right = torch.ones(size)

    def raising() -> Outputs:
        raise TypeError("cross_entropy() got an unexpected keyword\nand more")

    def ending() -> Outputs:
        os._exit(7)

    def hanging() -> Outputs:
        time.sleep(600)
        return ()

    calls = {"differs": lambda: (right + 1,), "raises": raising, "ends": ending, "hangs": hanging}
    peers = {name: Way(call, work=8.0, tolerance=1e-3) for name, call in calls.items()}
    ours = {"ours": Way(lambda: (right * 1,), OURS, 8.0, 1e-3), "as slow": Way(lambda: (right * 1,), OURS, 8.0, 1e-3)}
    ways = {"compiled": Way(lambda: (right * 1,), work=8.0, tolerance=1e-3, compiled=True), **ours, **peers}
    ways["copy"] = Way(right.clone, LIMIT, 24.0)
    return Setup(
        ways, SUBJECT, "bytes", "1 NVe", {"absent": "x is not installed"}, lambda: (torch.ones(size).double(),)
    )
