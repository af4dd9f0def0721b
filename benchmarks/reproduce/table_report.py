"""The table of answers in words, as Markdown and as figures: what each method leaves unsafe, prompt by prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness.machine import machine
from repo.common.errors import UserError, first_line
from repo.evaluation.tables import show
from repo.reporting.style import GRID, MUTED, STYLE

from .table import ANSWERS, BETA, LIMIT, PROMPTS, Row, unsafe_of_prompts

STYLES = {
    "reference": ("#737b84", ":"),
    "PPO": ("#c2410c", "--"),
    "PPO-Lagrangian": ("#b28600", "-."),
    "RePO": ("#0062a3", "-"),
}
"""Method -> colour and line."""
STRICTEST = 20.0  # lambda of the RePO policy that words and figures show
MET = 5e-4  # excess of E[C] over the limit that is rounded away in print


@dataclass(frozen=True)
class Written:
    """The files of one experiment: the table as Markdown, the figure of all methods, the figure by prompt."""

    table: Path
    figure: Path
    prompts: Path


def method_of(row: Row) -> str:
    """Return the row's name up to the comma."""
    return row.name.split(",")[0]


def one_of_each(table: Sequence[Row]) -> dict[str, Row]:
    """Return by method the row that words and figures show: of RePO the one with the largest lambda."""
    shown = (row for row in table if "RePO" not in row.name or (row.name, row.lam) == ("RePO", STRICTEST))
    return {method_of(row): row for row in shown}


def number(value: float, form: str = "{:.3f}") -> str:
    """Format a number; what is rounded to zero has no minus sign."""
    return show({"mean": value, "low": None, "high": None}, form)


def how_many(count: float) -> str:
    """Write how many prompts are mostly unsafe, e.g. "30 of 60" or "none"."""
    return f"{count:.0f} of {PROMPTS}" if count else "none"


def sentences(table: Sequence[Row]) -> str:
    """Write the claim with the numbers of the table."""
    shown = one_of_each(table)
    average, every = shown["PPO-Lagrangian"].figures, shown["RePO"].figures
    verb = "meets" if average["E[C]"] <= LIMIT + MET else "misses"
    first = (
        f"PPO-Lagrangian {verb} E[C] <= {LIMIT:g} (E[C] = {number(average['E[C]'])}) and leaves "
        f"{1 - average['safe answers']:.1%} of its answers unsafe: "
        f"{how_many(average['prompts mostly unsafe'])} prompts mostly unsafe."
    )
    left = every["prompts mostly unsafe"]
    many = f"{how_many(left)} prompts" if left else "no prompt"
    second = (
        f"RePO at lambda {STRICTEST:g} leaves {1 - every['safe answers']:.1%} unsafe, "
        f"{many} mostly unsafe, for a reward of {every['E[R]']:.2f} "
        f"instead of {average['E[R]']:.2f}."
    )
    return f"{first} {second}"


def print_claim(table: Sequence[Row], written: Written) -> None:
    """Print the table in short, the claim in two sentences and where the figures are."""
    console = Console(soft_wrap=True)
    title = f"{PROMPTS} prompts x {ANSWERS} answers, exact expectations, cost limit {LIMIT:g}"
    short = Table(title=title, box=box.SIMPLE, title_justify="left")
    short.add_column("")
    for column in ("unsafe answers", "prompts mostly unsafe", "E[C]", "E[R]"):
        short.add_column(column, justify="right")
    for row in (row for row in table if "split" not in row.name):
        name = f"RePO, lambda {row.lam:g}" if method_of(row) == "RePO" else method_of(row)
        figures = row.figures
        many = how_many(figures["prompts mostly unsafe"])
        short.add_row(
            name, f"{1 - figures['safe answers']:.1%}", many, number(figures["E[C]"]), number(figures["E[R]"])
        )
    console.print(short)
    console.print(sentences(table), highlight=False)
    console.print(f"\npicture: {written.prompts}   table: {written.table}", highlight=False, markup=False)


def markdown(table: Sequence[Row], updates: Mapping[float, int], seconds: float) -> str:
    """Return the results as Markdown. updates: of `repo_lambdas`. seconds: that the experiment took."""
    names = list(table[0].figures)
    formats = "{:.3f}", "{:.1%}", "{:d} of 60", "{:.3f}", "{:+.3f}", "{:.4f}", "{:.3f}", "{:.1e}"
    forms = dict(zip(names, formats, strict=True))
    lines = [
        "# An expected constraint hides unsafe prompts: the table of 60 prompts x 12 answers",
        "",
        f"`python -m benchmarks.reproduce.table`, {seconds:.0f} s, {machine()}. Softmax policies trained by",
        f"`repo_loss` from the reference (split: from uniform), exact expectations, beta {BETA}, limit {LIMIT:g}.",
        "",
        sentences(table),
        "",
        f"| | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for row in table:
        cells = ("-" if value != value else forms[key].format(value) for key, value in row.figures.items())
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    told = ", ".join(f"{target:g} after {n} updates" for target, n in updates.items())
    lines += [
        "",
        f"lambda by RePO's rule with eta 0.1 from 1, the policy always optimal: {told}.",
        "",
        "![unsafe answers prompt by prompt](reproduce_table_prompts.png)",
        "",
        "![safe answers and reward](reproduce_table.png)",
    ]
    return "\n".join(lines) + "\n"


def draw(table: Sequence[Row]) -> Figure:
    """Draw the mean reward against the share of safe answers."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.9))
        axes = figure.subplots()
        for row in table:
            split, repo = "split" in row.name, "RePO" in row.name
            point = row.figures["safe answers"], row.figures["E[R]"]
            axes.plot(
                *point,
                "s" if split else "o",
                color=STYLES[method_of(row)][0],
                mfc="none" if split else None,
                ms=8 if split else 6,
            )
            label = f"\u03bb = {row.lam:g}" if repo else method_of(row)
            beside, side = ((7, 3), "left") if split or "Lagrangian" in row.name else ((-7, -9), "right")
            beside, side = ((0, -15), "center") if row.lam == STRICTEST else (beside, side)
            axes.annotate(label, point, xytext=beside, textcoords="offset points", fontsize=8, ha=side)
        axes.set(xlim=(0.3, 1.12), ylim=(-0.25, 1.55), xlabel="share of safe answers", ylabel="mean reward E[R]")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
        axes.annotate("RePO, cost mode: circles rectified,\nsquares split", (0.8, 0.45), fontsize=8, ha="center")
        return figure


def draw_prompts(table: Sequence[Row]) -> Figure:
    """Draw the probability of an unsafe answer to each prompt, by method."""
    shown = one_of_each(table)
    average, every = shown["PPO-Lagrangian"].figures, shown["RePO"].figures
    many, few = (how_many(f["prompts mostly unsafe"]) for f in (average, every))
    left = "RePO leaves none." if few == "none" else f"RePO leaves {few}."
    with matplotlib.rc_context(STYLE | {"font.size": 11, "legend.fontsize": 10.5}):
        figure = Figure(figsize=(7, 4.5))
        axes = figure.subplots()
        figure.suptitle(
            f"PPO-Lagrangian keeps the mean cost at its limit and leaves\n{many} prompts mostly unsafe. {left}",
            fontsize=13,
            fontweight="bold",
            ha="left",
            x=0.012,
        )
        axes.axhspan(0.5, 1.0, color=GRID, alpha=0.45, lw=0)
        axes.text(PROMPTS + 0.5, 0.515, "mostly unsafe", color=MUTED, fontsize=9.5, ha="right", va="bottom")
        for method, row in shown.items():
            colour, line = STYLES[method]
            name = f"RePO, \u03bb = {row.lam:g}" if method == "RePO" else method
            cost = number(row.figures["E[C]"], "{:.2f}").replace("-", "\u2212")
            unsafe = unsafe_of_prompts(row.policy).sort(descending=True).values
            label = f"{name} (mean cost {cost})"
            axes.plot(range(1, PROMPTS + 1), unsafe, line, color=colour, label=label, lw=2.6, clip_on=False, zorder=3)
        axes.set(xlim=(0, PROMPTS + 1), ylim=(0, 1.005))
        axes.set_xlabel(f"the {PROMPTS} prompts, most unsafe first")
        axes.set_ylabel("probability of an unsafe answer")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, handlelength=2.6)
        return figure


def write(folder: Path, table: Sequence[Row], updates: Mapping[float, int], seconds: float) -> Written:
    """Write the table and both figures to a folder, which is made if it is missing.

    Raises:
        UserError: the folder cannot be written to.
    """
    names = "reproduce_table.md", "reproduce_table.png", "reproduce_table_prompts.png"
    written = Written(*(folder / name for name in names))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written.table.write_text(markdown(table, updates, seconds), encoding="utf-8")
        draw(table).savefig(written.figure, dpi=144)
        draw_prompts(table).savefig(written.prompts, dpi=144)
    except OSError as error:
        raise UserError(f"--out: cannot write to {folder} ({first_line(error)})") from None
    return written
