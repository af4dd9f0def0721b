"""The fused kernel alone, in any launch form: the only module here that knows how the Triton backend launches.

After a change of the backend's launches, `Form`, `all_forms`, `captured_launch` and `time_form` are what must follow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.bench_loss import Problem, fused
from benchmarks.harness.cases import Outputs

Launch = Callable[[], tuple[Any, ...]]


class Form(NamedTuple):
    """How the fused kernel is launched.

    warps: of a program. pieces: of 16 bytes in a block. registers: limit of a thread, or None.
    """

    warps: int
    pieces: int
    registers: int | None

    @property
    def name(self) -> str:
        """Return the name of the row."""
        limit = f", {self.registers} registers" if self.registers else ""
        return f"{self.warps} warps, {self.pieces} pieces{limit}"


def all_forms(rehearsal: bool) -> list[Form]:
    """Return every form that is tried; the first and the last of them in a rehearsal."""
    forms = [Form(*values) for values in itertools.product([4, 8, 16, 32], [512, 1024, 2048, 4096], [None, 64, 128])]
    return [forms[0], forms[-1]] if rehearsal else forms


def captured_launch(p: Problem) -> Launch:
    """Return a function that gives the launch of the fused kernel that repo_loss makes; its first call makes it."""
    from repo_kernels.backends.triton import launch as backend

    @functools.cache
    def launch() -> tuple[Any, ...]:
        seen: list[tuple[Any, ...]] = []
        original = backend.launch
        backend.launch = lambda *arguments: (seen.append(arguments), original(*arguments))[1]
        try:
            fused(p, p.logits, backend="triton")
        finally:
            backend.launch = original
        return seen[0]

    return launch


def time_form(form: Form | None, launch: Launch) -> Callable[[], Outputs]:
    """Return a call that makes a captured launch in this form, or as it was for None; it returns (gradient,)."""
    from repo_kernels.backends.triton import launch as backend

    @functools.cache
    def arguments() -> tuple[Any, ...]:
        variant, *others = launch()
        if form is not None:
            constexprs = {**variant.constexprs, "R": form.pieces, "HELD": 0}
            variant = dataclasses.replace(
                variant, num_warps=form.warps, max_registers=form.registers, constexprs=constexprs
            )
        return variant, *others

    def call() -> Outputs:
        _, _, _, _, grad, *_ = arguments()
        backend.launch(*arguments())
        return (grad,)

    return call
