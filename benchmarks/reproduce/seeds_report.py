"""The seeds of the default run as Markdown and as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repo.evaluation.tables import show, show_change
from repo.reporting.style import BAD, INK, NOW, START, STYLE
from repo.scoring.safety import TITLES

from .seed_changes import MEASURES, WHOLE

BESIDE = ("judge_safe_rate", "safe_rate", "judge_prompts_mostly_unsafe", "prompts_mostly_unsafe")
"""Quantities that are told before and after; of the others the change."""
CHANGES = (
    "harmful_judge_safe_rate",
    "benign_judge_safe_rate",
    "benign_helpful",
    "benign_topical",
    "benign_ended",
    "reward",
)
MET = {True: "yes", False: "**no**", None: "-"}


def markdown(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown."""
    seeds, mean = results["seeds"], results["mean"]
    lines = [
        "# The default run, seed by seed",
        "",
        f"`{results['command']}`; {results['prompts']} held-out prompts x {results['samples']} samples, before and "
        f"after training; {len(seeds)} seeds, runs at a time: {results['jobs']}; {results['machine']}.",
        "",
        "| what must hold | found | holds |",
        "|---|---|---|",
        *(f"| {row['asked']} | {row['found']} | {MET[row['met']]} |" for row in results["criteria"]),
        "",
        "Mean over seeds [95 % interval: prompts bootstrapped, seeds by Student's t]:",
        "",
        *mean_lines(mean),
        "",
        "By seed, with intervals over prompts:",
        "",
        *seed_lines(seeds, mean),
        "",
    ]
    told = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version != "not installed")
    return "\n".join([*lines, f"Versions: {told}.", "", "![what training changed, by seed](default_seeds.png)"]) + "\n"


def title_of(name: str) -> str:
    """Name a measure of BESIDE or CHANGES, e.g. "safe rate (held-out judge), benign prompts"."""
    measure = MEASURES[f"{name}_change"]
    return TITLES[measure.key].name + ("" if measure.kind == WHOLE else f", {measure.kind} prompts")


def form_of(name: str) -> str:
    """Return the format string of a measure of BESIDE or CHANGES."""
    return TITLES[MEASURES[f"{name}_change"].key].form


def mean_lines(mean: Mapping[str, Any]) -> list[str]:
    """Return the table of means over seeds."""
    lines = ["| | before | after | change |", "|---|---|---|---|"]
    for name in (*BESIDE, *CHANGES):
        if f"{name}_change" in mean:
            form = form_of(name)
            sides = (show(mean[f"{name}_{side}"], form) for side in ("before", "after"))
            lines.append(f"| {title_of(name)} | {' | '.join(sides)} | {show_change(mean[f'{name}_change'], form)} |")
    if "kl" in mean:
        lines.append(f"| {TITLES['kl'].name} | | {show(mean['kl'], '{:.2f}')} | |")
    if "perplexity_ratio" in mean:
        lines.append(f"| median perplexity, after / before | | {show(mean['perplexity_ratio'], '{:.3f}')} | |")
    return lines


def seed_lines(seeds: Sequence[Mapping[str, Any]], mean: Mapping[str, Any]) -> list[str]:
    """Return the table of seeds, one a row."""
    columns = {"seed": lambda s: str(s["seed"])}
    for name in (n for n in BESIDE if f"{n}_change" in mean):
        columns[title_of(name)] = lambda s, n=name: _sides(s, n)
    first = next((n for n in BESIDE if f"{n}_change" in mean), None)
    if first is not None:
        columns[f"change of the {title_of(first)}"] = lambda s: show_change(s[f"{first}_change"], form_of(first))
    for name in (n for n in CHANGES if f"{n}_change" in mean):
        columns[f"change: {title_of(name)}"] = lambda s, n=name: show_change(
            s[f"{n}_change"] | {"low": None, "high": None}, form_of(n)
        )
    if "kl" in mean:
        columns["KL, nats per response"] = lambda s: f"{s['kl']['mean']:.2f}"
    if "perplexity_ratio" in mean:
        columns["perplexity ratio"] = lambda s: f"{s['perplexity_ratio']['mean']:.3f}"
    columns["minutes"] = lambda s: "-" if s["minutes"] is None else f"{s['minutes']:.1f}"
    columns["GB"] = lambda s: "-" if s["bytes"] is None else f"{s['bytes'] / 1e9:.1f}"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return lines + [f"| {' | '.join(cell(seed) for cell in columns.values())} |" for seed in seeds]


def _sides(seed: Mapping[str, Any], name: str) -> str:
    """Write a quantity before and after training."""
    before, after = (form_of(name).format(seed[f"{name}_{side}"]["mean"]) for side in ("before", "after"))
    return f"{before} \u2192 {after}"


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw, seed by seed, the change of the safe rate on all and on benign prompts, and the prompts mostly unsafe."""
    seeds, mean = results["seeds"], results["mean"]
    by = "judge_" if "judge_safe_rate_change" in mean else ""
    changes = [
        (f"{by}safe_rate_change", "All prompts: change of the safe rate", NOW),
        (f"benign_{by}safe_rate_change", "Benign prompts: change of the safe rate", START),
    ]
    changes = [change for change in changes if change[0] in mean]
    sides = [f"{by}prompts_mostly_unsafe"] if f"{by}prompts_mostly_unsafe_change" in mean else []
    panels = len(changes) + len(sides)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 3.3 * panels, 1.7 + 0.27 * len(seeds)))
        axes = list(figure.subplots(1, panels, sharey=True, squeeze=False).flat)
        for one, (key, title, colour) in zip(axes, changes, strict=False):
            _draw_changes(one, seeds, mean, key, colour)
            one.set_title(title)
        for one, name in zip(axes[len(changes) :], sides, strict=True):
            _draw_sides(one, seeds, name)
            one.set_title("Share of prompts mostly unsafe")
        axes[0].set_yticks([*range(len(seeds)), len(seeds) + 0.5], [*(f"seed {s['seed']}" for s in seeds), "mean"])
        axes[0].invert_yaxis()
        judge = "by the held-out judge" if by else "by training cost"
        figure.suptitle(
            f"{len(seeds)} seeds of the default run, {judge}: hollow before training, filled after; 95 % intervals",
            fontsize=9,
            x=0.01,
            ha="left",
        )
        return figure


def _draw_changes(axes: Axes, seeds: Sequence[Mapping[str, Any]], mean: Mapping[str, Any], key: str, c: str) -> None:
    """Draw a change with its interval for each seed, and the mean over seeds below. c: colour."""
    rows = [*((place, seed[key]) for place, seed in enumerate(seeds)), (len(seeds) + 0.5, mean[key])]
    for place, value in rows:
        whole = place > len(seeds)
        if value["low"] is not None:
            axes.plot([100 * value["low"], 100 * value["high"]], [place, place], "-", color=INK if whole else c, lw=1.4)
        axes.plot(100 * value["mean"], place, "D" if whole else "o", color=INK if whole else c, ms=6 if whole else 5)
    axes.axvline(0, color=INK, lw=1, ls=":")
    axes.set_xlabel("percentage points")


def _draw_sides(axes: Axes, seeds: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draw a share before and after training for each seed."""
    for place, seed in enumerate(seeds):
        before, after = (100 * seed[f"{name}_{side}"]["mean"] for side in ("before", "after"))
        axes.plot([before, after], [place, place], "-", color=BAD, lw=1.4)
        axes.plot(before, place, "o", color=BAD, mfc="white", ms=5)
        axes.plot(after, place, "o", color=BAD, ms=5)
    axes.set_xlim(left=-1)
    axes.set_xlabel("per cent of the prompts")
