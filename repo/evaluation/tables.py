"""Tables: print evaluations with their intervals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..runs.model_card import has_intervals
from ..scoring.safety import TITLES, compensation_sentence
from .kinds import SHOWN, changes_by_kind, measured_by_kind
from .statistics import QUANTITIES, Evaluation, measured, paired

IN_CATEGORIES = ("reward", "safe_rate", "judge_safe_rate", "rectified_cost", "refusal_rate", "response_tokens")


def show(value: Mapping[str, float | None], form: str) -> str:
    """Format an interval as `mean [low, high]`, as `mean` if there is no interval, and as `-` if there is no mean.

    value: {"mean", "low", "high"}. form: format string of a number, such as "{:.3f}".
    """
    if value["mean"] is None:
        return "-"
    mean, low, high = (None if value[k] is None else _number(value[k], form) for k in ("mean", "low", "high"))
    return f"{mean}" if low is None else f"{mean} [{low}, {high}]"


def _number(value: float | None, form: str) -> str:
    """Format a number; what is rounded to zero has no minus sign."""
    text = form.format(value)
    return form.format(0.0) if re.fullmatch(r"-0(\.0+)?%?", text) else text


def show_change(value: Mapping[str, float | None], form: str) -> str:
    """Format the interval of a difference, with signs; differences of shares are in percentage points."""
    if form.endswith("%}"):
        points = {key: None if v is None else 100 * v for key, v in value.items()}
        return f"{show(points, form.replace('{:', '{:+').replace('%}', 'f}'))} points"
    return show(value, form.replace("{:", "{:+"))


def print_summary(console: Console, title: str, summary: Mapping[str, Any]) -> None:
    """Print every quantity with its interval, then some of them for each category of prompts.

    title: what was evaluated. summary: the result of Evaluation.summary.
    """
    many = f"{summary['prompts']} held-out prompts x {summary['samples']} samples"
    table = Table(title=escape(f"{title}: {many} (95 % bootstrap intervals over prompts)"))
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for key, value in summary["overall"].items():
        table.add_row(TITLES[key].name, show(value, TITLES[key].form))
    for kind, values in summary.get("kinds", {}).items():
        table.add_section()
        for key in (key for key in SHOWN if key in values):
            table.add_row(kind_title(key, kind, values["prompts"]), show(values[key], TITLES[key].form))
    console.print(table)
    if len(summary["categories"]) > 1:
        console.print(_categories(summary))


def _categories(summary: Mapping[str, Any]) -> Table:
    table = Table(title="by category of prompts")
    shown = [key for key in IN_CATEGORIES if key in summary["overall"]]
    for column in ("category", "prompts", *(TITLES[key].name for key in shown)):
        table.add_column(column, justify="left" if column == "category" else "right")
    for category, values in sorted(summary["categories"].items(), key=lambda item: -item[1]["prompts"]):
        cells = (show(values[key] | {"low": None}, TITLES[key].form) for key in shown)
        table.add_row(escape(category), str(values["prompts"]), *cells)
    return table


def kind_title(key: str, kind: str, prompts: int) -> str:
    """Name a quantity of one kind of prompts, e.g. "safe rate (training cost), 55 harmful prompts"."""
    return f"{TITLES[key].name}, {prompts} {kind} prompts"


def comparison_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str, str]]:
    """List (name, before, after, paired change) of every quantity as text, then of some for each kind of prompts.

    The first is the share of prompts that are mostly unsafe, by the held-out judge if there is one.
    """
    values, others, changes = measured(before.columns), measured(after.columns), paired(before, after)
    rows = [
        (t.name, show(values[key], t.form), show(others[key], t.form), show_change(changes[key], t.form))
        for key, t in TITLES.items()
        if key in changes
    ]
    return rows + kind_rows(before, after)


def kind_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str, str]]:
    """List (name, before, after, paired change) of some quantities for harmful and for benign prompts as text."""
    ours, theirs, rows = measured_by_kind(before), measured_by_kind(after), []
    for kind, changes in changes_by_kind(before, after).items():
        for key in (key for key in SHOWN if key in changes):
            form, (a, b) = TITLES[key].form, (ours[kind], theirs[kind])
            name = kind_title(key, kind, b["prompts"])
            rows.append((name, show(a[key], form), show(b[key], form), show_change(changes[key], form)))
    return rows


def print_compensation(console: Console, evaluation: Evaluation) -> None:
    """Print a warning if the mean cost meets the constraint although prompts are unsafe."""
    if evaluation.samples == 1:  # a prompt's single response does not say what it mostly gets
        return
    mean, unsafe = (QUANTITIES[key](evaluation.columns) for key in ("cost", "prompts_mostly_unsafe"))
    sentence = compensation_sentence(float(mean), evaluation.limit, float(unsafe))
    if sentence:
        console.print(f"held-out prompts: {sentence}", style="yellow", highlight=False)


def print_comparison(console: Console, prompts: int, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """Print each quantity before and after training with its interval, and the paired change.

    prompts: number of held-out prompts. rows: the result of comparison_rows.
    """
    intervals = "95 % bootstrap intervals over prompts" if has_intervals(rows) else "too few for intervals"
    table = Table(title=f"{prompts} held-out prompts, before and after ({intervals})")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
