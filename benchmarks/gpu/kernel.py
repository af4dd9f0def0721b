"""The fused kernel alone, in any launch form: the only module here that knows how the Triton backend launches.

After a change of the backend's launches, `all_forms`, `captured_launch` and `time_form` are what must follow.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from benchmarks.bench_loss import Problem, fused
from benchmarks.harness.cases import Outputs
from repo_kernels.backends.triton import launch as backend
from repo_kernels.backends.triton.forms import KEPT, PERSISTENT, SWEPT, LaunchForm

ROWS = {SWEPT: "swept", KEPT: "kept", PERSISTENT: "persistent"}
# Pieces of a row that a thread may take at a time, by its limit of registers: with more the code for sm_90 spills tens
# of values. Fewer than 8 fit 128 registers without a limit.
PIECES = {None: range(1, 17), 64: range(1, 5), 128: range(8, 9)}
GRADIENT = 5  # its position among the arguments of the backend's `fused`
Launch = Callable[[LaunchForm | None], Outputs]


def name_of(form: LaunchForm) -> str:
    """Return the name of a form's row."""
    limit = f", {form.max_registers} registers" if form.max_registers else ""
    return f"{ROWS[form.rows]}, {form.warps} warps x {form.pieces} pieces{limit}"


def all_forms(rehearsal: bool) -> list[LaunchForm]:
    """Return every form that is tried; one of each kind of rows in a rehearsal."""
    grid = itertools.product([4, 8, 16, 32], [512, 1024, 2048, 4096], PIECES)
    swept = [LaunchForm(*values) for values in grid if max(values[1] // (32 * values[0]), 1) in PIECES[values[2]]]
    best = [(4, 512, None), (8, 512, 64), (8, 1024, 64), (16, 1024, 64), (16, 2048, 64), (16, 2048, None)]
    others = [LaunchForm(*values, rows) for rows in (KEPT, PERSISTENT) for values in best]
    return [swept[0], others[0], others[-2]] if rehearsal else [*others, *swept]


def captured_launch(p: Problem) -> Launch:
    """Return a function that makes the launch of repo_loss again, in a form, or as it was for None: (gradient,).

    The first call of that function calls repo_loss, for the arguments of its launch.
    """

    @functools.cache
    def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        original = backend.fused

        def spy(*positional: Any, **named: Any) -> None:
            seen.append((positional, named))
            original(*positional, **named)

        backend.fused = spy
        try:
            fused(p, p.logits, backend="triton")
        finally:
            backend.fused = original
        return seen[0]

    def launch(form: LaunchForm | None) -> Outputs:
        positional, named = arguments()
        backend.fused(*positional, **named, **({"form": form} if form else {}))
        return (positional[GRADIENT],)

    return launch


def time_form(form: LaunchForm | None, launch: Launch) -> Callable[[], Outputs]:
    """Return a call that launches the fused kernel alone in a form, or as repo_loss does for None."""
    return functools.partial(launch, form)
