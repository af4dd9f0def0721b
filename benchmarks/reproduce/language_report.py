"""The comparison of methods as Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from repo.evaluation.tables import show, show_change
from repo.reporting.style import INK, START, STYLE
from repo.scoring.safety import TITLES

from .methods import METHODS, title_of

SHOWN = (
    "reward",
    "cost",
    "safe_rate",
    "rectified_cost",
    "compensation_gap",
    "prompts_mostly_unsafe",
    "judge_safe_rate",
    "judge_prompts_mostly_unsafe",
    "refusal_rate",
    "repetition",
    "topical",
    "ended",
    "helpful",
    "perplexity",
    "response_tokens",
    "kl",
)
"""Quantities in the order of the tables; those that an evaluation lacks are left out."""
BY_SEED = ("reward", "safe_rate", "prompts_mostly_unsafe", "judge_safe_rate", "judge_prompts_mostly_unsafe", "cost")
PANELS = (
    ("safe_rate", "reward"),
    ("judge_safe_rate", "reward"),
    ("judge_prompts_mostly_unsafe", "reward"),
    ("prompts_mostly_unsafe", "cost"),
)
"""Quantities on the two axes of each panel of the figure."""
UNSAFE = (("judge_prompts_mostly_unsafe", "reward"), ("prompts_mostly_unsafe", "reward"))
"""Panels of which a figure of one panel has the first that there are numbers for: no judge is needed for the second."""
COLUMNS = 2


def markdown(results: Mapping[str, Any], name: str) -> str:
    """Return the results as Markdown. name: of the files that hold them."""
    methods, against = results["methods"], results["against"]
    trained = ", ".join(f"{count} runs on {machine}" for machine, count in results["machines"].items())
    runs = f"{results['minutes']:.0f} minutes of training in all: {trained}"
    lines = [
        "# Every prompt or the average: the methods on the embedded language model",
        "",
        f"`{results['command']}`; {results['prompts']} held-out prompts x {results['samples']} samples, "
        f"seeds {results['seeds']}; {results['machine']}; {runs}.",
        "",
        f"Every method has the default configuration but for the options that name it. A response is safe iff its cost "
        f"is at most {results['cost_limit']:g}, for all of them. Mean over seeds [95 % interval: prompts bootstrapped, "
        "seeds by Student's t].",
        "",
        *table(methods, SHOWN, lambda key, value: show(value, TITLES[key].form)),
        *spent_rows(methods, results["spent"]),
    ]
    lines += kind_lines(results["kinds"])
    if against["methods"]:
        lines += ["", f"Differences from {title_of(against['method'])}, on the same prompts:", ""]
        lines += table(against["methods"], SHOWN, lambda key, value: show_change(value, TITLES[key].form))
    if results["matched"]:
        lines += ["", *matched_lines(results["matched"])]
    lines += ["", "By seed:", "", *table(methods, BY_SEED, by_seed)]
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version != "not installed")
    lines += ["", f"Versions: {told}.", "", f"![reward against safety by method]({name}.png)"]
    return "\n".join(lines) + "\n"


def table(methods: Mapping[str, Mapping[str, Any]], keys: tuple[str, ...], cell: Any) -> list[str]:
    """Return the lines of a Markdown table: a column for each method, a row for each quantity that all of them have.

    Args:
        cell: called with a quantity's key and value; returns text.
    """
    lines = [f"| | {' | '.join(title_of(m) for m in methods)} |", "|---|" + "---|" * len(methods)]
    for key in keys:
        if all(key in quantities for quantities in methods.values()):
            cells = " | ".join(cell(key, quantities[key]) for quantities in methods.values())
            lines.append(f"| {TITLES[key].name} | {cells} |")
    return lines


def kind_lines(kinds: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write a table for each kind of prompt."""
    lines = list[str]()
    for kind, here in kinds.items():
        lines += ["", f"The {here['prompts']} {kind} prompts alone:", ""]
        lines += table(here["methods"], SHOWN, lambda key, value: show(value, TITLES[key].form))
    return lines


def spent_rows(methods: Mapping[str, Any], spent: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the rows of a table's last quantities: what a run took. The reference has taken nothing."""

    def tokens(of: Mapping[str, Any], seeds: int) -> str:
        if of.get("tokens") is None:
            return ""
        return f"{of['tokens']:.0f}" + (f" ({of['counted']} of {seeds} seeds)" if of["counted"] < seeds else "")

    runs = [(spent.get(method, {}), len(quantities["reward"]["seeds"])) for method, quantities in methods.items()]
    minutes = " | ".join(f"{of['minutes']:.1f}" if of else "" for of, _ in runs)
    return [
        f"| minutes of training, median of the seeds | {minutes} |",
        f"| response tokens learned from | {' | '.join(tokens(*run) for run in runs)} |",
    ]


def by_seed(key: str, value: Mapping[str, Any]) -> str:
    """Write the values of all seeds."""
    return ", ".join(TITLES[key].form.format(v) for v in value["seeds"])


def matched_lines(matched: Mapping[str, Any]) -> list[str]:
    """Write how PPO-Lagrangian was held at RePO's mean cost, what it reached, and what that leaves unsafe."""
    limits = ", then ".join(
        f"{r['limit']:.3f} (E[C] in training {r['reached']:.3f})" if r["reached"] is not None else f"{r['limit']:.3f}"
        for r in matched["rounds"]
    )
    same, beyond = show_change(matched["cost"], "{:.3f}"), show_change(matched["beyond_twice"], "{:.1%}")
    verdict = "not the same, so what follows compares policies of different mean cost"
    if matched["is_matched"]:
        verdict = f"the same, within {matched['within']:g}"
    times = "" if matched["ratio"] is None else f"{matched['ratio']:.2f} times as many as RePO; "
    return [
        "PPO-Lagrangian with RePO's mean cost as its limit:",
        "",
        f"- RePO's policies have a mean cost of {matched['target']:.3f} in the last {matched['responses']} responses "
        "of training, the mean over seeds; held-out prompts take no part in this.",
        f"- PPO-Lagrangian's limit: {limits}.",
        f"- On the held-out prompts its E[C] less RePO's is {same}: {verdict}.",
        f"- Prompts that it leaves mostly unsafe by training cost: {times}its share less twice RePO's is {beyond}.",
    ]


def draw(results: Mapping[str, Any], among: Sequence[tuple[str, str]] = PANELS, most: int = len(PANELS)) -> Figure:
    """Draw a panel for each pair of quantities `among` those given that all methods have, the first `most`.

    Seeds are hollow.
    """
    methods = results["methods"]
    pairs = [pair for pair in among if all(set(pair) <= set(quantities) for quantities in methods.values())][:most]
    columns = min(COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.4, 3.3 * rows + 0.7))
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axes, (across, up) in zip(panels, pairs, strict=False):
            for method, quantities in methods.items():
                x, y = quantities[across], quantities[up]
                colour, mark = (METHODS[method].colour, METHODS[method].marker) if method in METHODS else (START, "o")
                axes.plot(x["seeds"], y["seeds"], mark, color=colour, mfc="white", ms=4)
                errors = [[[v["mean"] - v["low"]], [v["high"] - v["mean"]]] for v in (y, x)]
                label = title_of(method)
                axes.errorbar(
                    x["mean"], y["mean"], *errors, fmt=mark, color=colour, capsize=3, elinewidth=1, label=label
                )
            axes.set(xlabel=TITLES[across].name, ylabel=TITLES[up].name)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            if up == "cost":
                axes.axhline(results["cost_limit"], color=INK, lw=1, ls=":")
                axes.set_title(f"dotted: the cost limit, {results['cost_limit']:g}", fontsize=8)
        for axes in panels[len(pairs) :]:
            axes.remove()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=9)
        return figure
