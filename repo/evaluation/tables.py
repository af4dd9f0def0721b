"""Tables: evaluations as text, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..scoring.safety import TITLES, compensation_sentence
from .statistics import QUANTITIES, Evaluation, measured, paired

IN_CATEGORIES = ("reward", "safe_rate", "judge_safe_rate", "rectified_cost", "refusal_rate", "response_tokens")


def show(value: Mapping[str, float | None], form: str) -> str:
    """mean [low, high]; the mean alone where there is no interval, - where there is no mean."""
    if value["mean"] is None:
        return "-"
    if value["low"] is None:
        return form.format(value["mean"])
    mean, low, high = (form.format(value[k]) for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def show_change(value: Mapping[str, float | None], form: str) -> str:
    """As show, of a difference: with its sign, and of shares in percentage points."""
    if form.endswith("%}"):
        points = {key: None if v is None else 100 * v for key, v in value.items()}
        return f"{show(points, form.replace('{:', '{:+').replace('%}', 'f}'))} points"
    return show(value, form.replace("{:", "{:+"))


def print_summary(console: Console, title: str, summary: Mapping[str, Any]) -> None:
    """Every quantity with its interval, then some of them for each category of prompts."""
    many = f"{summary['prompts']} held-out prompts x {summary['samples']} samples"
    table = Table(title=escape(f"{title}: {many} (95 % bootstrap intervals over prompts)"))
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for key, value in summary["overall"].items():
        table.add_row(TITLES[key].name, show(value, TITLES[key].form))
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


def comparison_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str, str]]:
    """(name, before, after, paired change) as text."""
    values, others, changes = measured(before.columns), measured(after.columns), paired(before, after)
    return [
        (t.name, show(values[key], t.form), show(others[key], t.form), show_change(changes[key], t.form))
        for key, t in TITLES.items()
        if key in changes
    ]


def print_compensation(console: Console, evaluation: Evaluation) -> None:
    """The sentence about a mean constraint that is met while prompts are unsafe, where that is so."""
    found = {key: QUANTITIES[key](evaluation.columns) for key in ("cost", "prompts_mostly_unsafe")}
    told = compensation_sentence(float(found["cost"]), evaluation.limit, float(found["prompts_mostly_unsafe"]))
    if told:
        console.print(f"held-out prompts: {told}", style="yellow", highlight=False)


def print_comparison(console: Console, before: Evaluation, after: Evaluation) -> None:
    """The closing lines of a run: each quantity before and after with intervals, and the paired change."""
    title = f"{len(before.ids)} held-out prompts, before and after (95 % bootstrap intervals over prompts)"
    table = Table(title=title)
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in comparison_rows(before, after):
        table.add_row(*row)
    console.print(table)
