"""Draw reward against safe rate of evaluated policies, and the Pareto frontier: those that no other one dominates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from .style import GRID, INK, MUTED, NOW, START, STYLE

MARKERS = "osD^vP*X"
COLOURS = ("#0062a3", "#c2410c", "#00795a", "#8a3ffc", "#737b84", "#b28600", "#a2191f", "#1c2024")

SAFE_RATES = {"safe_rate": "safe rate (training cost)", "judge_safe_rate": "safe rate (held-out judge)"}
"""Quantities of the x axis, with their labels."""

Trail = Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]]
"""(name, quantities with intervals) of a policy's evaluations, in the order of training."""


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """List the indices of the points (safe rate, reward) that no other point dominates, by rising safe rate.

    A point dominates another one if it is at least as good in both and better in one.
    """
    return [
        i
        for i in sorted(range(len(points)), key=lambda i: points[i])
        if not any(q[0] >= points[i][0] and q[1] >= points[i][1] and q != points[i] for q in points)
    ]


def draw_frontier(trails: Mapping[str, Trail]) -> Figure:
    """Draw each policy's path through training and the frontier of all evaluations.

    Markers are hollow, except for the last evaluation, which has its intervals. trails: by the policy's name.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.4))
        axes = figure.subplots()
        points = []
        for n, (name, trail) in enumerate(trails.items()):
            colour, marker = COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]
            x, y = zip(*((q["safe_rate"]["mean"], q["reward"]["mean"]) for _, q in trail), strict=True)
            points += list(zip(x, y, strict=True))
            axes.plot(x, y, marker=marker, mfc="white", color=colour, lw=1, ms=6)
            last = trail[-1][1]
            across, up = _around(last["safe_rate"]), _around(last["reward"])
            axes.errorbar(
                x[-1], y[-1], up, across, fmt=marker, color=colour, ms=7, elinewidth=1, capsize=3, label=_short(name)
            )
        best = [points[i] for i in frontier(points)]
        left, bottom = axes.get_xlim()[0], axes.get_ylim()[0]  # the frontier of a single point is a corner
        best = [(left, best[0][1]), *best, (best[-1][0], bottom)]
        axes.set_xlim(left=left)
        axes.set_ylim(bottom=bottom)
        axes.step(*zip(*best, strict=True), where="pre", color=INK, lw=1.3, ls="--", label="frontier", zorder=1.5)
        axes.set_xlabel("safe rate (training cost)")
        axes.set_ylabel("reward")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.tick_params(colors=GRID, labelcolor=MUTED)
        axes.title.set_color(INK)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        return figure


def draw_scales(points: Sequence[tuple[float, Mapping[str, Mapping[str, Any]]]]) -> Figure:
    """Draw the reward against the safe rate of one policy at several scales of its update, a panel for each judge.

    points: (scale, quantities with intervals), by rising scale; 0 is the reference, which is drawn hollow.
    """
    panels = [key for key in SAFE_RATES if all(key in quantities for _, quantities in points)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(panels), 4.4))
        for axes, key in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            x, y = ([q[name]["mean"] for _, q in points] for name in (key, "reward"))
            axes.plot(x, y, color=NOW, lw=1, zorder=1.5)
            for (scale, q), across, up in zip(points, x, y, strict=True):
                colour, face = (START, "white") if scale == 0 else (NOW, NOW)
                bars = _around(q["reward"]), _around(q[key])
                axes.errorbar(across, up, *bars, fmt="o", color=colour, mfc=face, ms=6, elinewidth=1, capsize=3)
                name = "0 (reference)" if scale == 0 else f"{scale:g}"
                axes.annotate(name, (across, up), (6, 6), textcoords="offset points", color=INK, fontsize=9)
            axes.set_xlabel(SAFE_RATES[key])
            axes.set_ylabel("reward")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.tick_params(colors=GRID, labelcolor=MUTED)
            axes.set_title("scale of the update")
        return figure


def _short(name: str, longest: int = 28) -> str:
    """Shorten a name for a legend; a zero-width space keeps matplotlib from hiding one that begins with _."""
    short = name if len(name) <= longest else f"...{name[3 - longest :]}"
    return f"\u200b{short}"


def _around(value: Mapping[str, float]) -> list[list[float]]:
    if value["low"] is None:
        return [[0.0], [0.0]]
    return [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
