"""Which launch form of the fused kernel is fastest at which width, the kernel alone beside a copy?

Work is 2 NVe, as in losses.py. Every form's gradient is compared with fp64 before it is timed.
"""

from __future__ import annotations

from typing import Any

from benchmarks.bench_loss import TOLERANCE, gradient, make_problem, plain
from benchmarks.gpu.kernel import all_forms, captured_launch, name_of, time_form
from benchmarks.gpu.plan import Plan
from benchmarks.harness.cases import Outputs, Setup, Way
from benchmarks.harness.limits import device_copy
from benchmarks.harness.results import OURS

NAME = "forms"
SUBJECT = "as launched"
PEAKS = False
SAME_CODE = True  # the kernel is compiled once for all widths
DTYPE = "bf16"


def cases(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the parameters of each case by its name."""
    return {
        f"{tokens} x {vocabulary} {DTYPE}": {
            "tokens": tokens,
            "vocabulary": vocabulary,
            "copied": plan.copied,
            "rehearsal": plan.rehearsal,
        }
        for tokens, vocabulary in plan.forms
    }


def small(parameters: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the parameters of a problem of the same width with few tokens."""
    return {**parameters, "tokens": plan.few}


def setup(tokens: int, vocabulary: int, copied: int, rehearsal: bool) -> Setup:
    """Set up all forms."""
    p = make_problem(DTYPE, tokens, vocabulary, 0.0, False)
    one_pass = p.logits.numel() * p.logits.element_size()

    def exact() -> Outputs:
        return gradient(plain, p.in_fp64())[1:]

    launch = captured_launch(p)
    forms = {SUBJECT: None} | {name_of(form): form for form in all_forms(rehearsal)}
    ways = {name: Way(time_form(form, launch), OURS, 2.0 * one_pass, TOLERANCE[DTYPE]) for name, form in forms.items()}
    formula = f"1 NVe = {tokens} x {vocabulary} x {p.logits.element_size()} = {one_pass / 1e6:.0f} MB"
    return Setup(ways | device_copy(copied), SUBJECT, "bytes", formula, expected=exact)
