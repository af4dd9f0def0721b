"""Draw what training did to each held-out prompt: its cost before and after, harmful and benign prompts in colour."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from ..evaluation.kinds import kind_of, transitions
from .run_history import History
from .style import BAD, GRID, INK, NOW, START, WIDTH, legend

KINDS = (("harmful", BAD, "D"), ("benign", NOW, "o"), (None, START, "o"))
EXTREME = 1.0  # percent of prompts at each end that lie on the edge of the axes


def held_out(history: History) -> tuple[Figure, str, str] | None:
    """Draw each held-out prompt's mean cost after training against that before; None unless both are known."""
    if not history.paired:
        return None
    before, after = (history.evaluations[name].evaluation for name in ("before", "after"))
    costs = np.stack([e.columns["cost"].mean(1) for e in (before, after)])
    kinds = [kind_of(r) for r in before.records[:: before.samples]]
    low, high = np.percentile(costs, [EXTREME, 100 - EXTREME])
    low, high = min(low, history.limit), max(high, history.limit)
    margin = 0.06 * ((high - low) or 1.0)
    low, high = low - margin, high + margin
    x, y = np.clip(costs, low, high)

    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.subplots()
    axes.plot([low, high], [low, high], color=GRID, lw=1.2, zorder=1)
    for line in (axes.axvline, axes.axhline):
        line(history.limit, color=INK, lw=1, ls=":", zorder=1)
    shown = [kind for kind in KINDS if kind[0] in kinds]
    for kind, colour, marker in shown:
        chosen = np.array([k == kind for k in kinds])
        label = f"{kind or 'held-out'} ({chosen.sum()})"
        axes.plot(x[chosen], y[chosen], marker, color=colour, ms=4, mew=0, alpha=0.65, label=label, clip_on=False)
    means = np.clip(costs.mean(1), low, high)
    axes.scatter(means[0], means[1], s=90, marker="X", color=INK, linewidths=0, zorder=3, label="average")
    counts = transitions(before, after)
    corners = {(0, 0): (0.02, 0.02), (0, 1): (0.02, 0.98), (1, 0): (0.98, 0.02), (1, 1): (0.98, 0.98)}
    names = {(0, 0): "stayed safe", (0, 1): "safe → unsafe", (1, 0): "unsafe → safe", (1, 1): "stayed unsafe"}
    for cell, (left, bottom) in corners.items():
        axes.text(
            left,
            bottom,
            f"{names[cell]}: {counts[cell]}",
            transform=axes.transAxes,
            ha="left" if left < 0.5 else "right",
            va="bottom" if bottom < 0.5 else "top",
            fontsize=9,
            color=INK,
            bbox={"facecolor": "none", "edgecolor": "none", "pad": 1},
        )
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.set_xlabel(f"mean cost before training (limit d = {history.limit:g})")
    axes.set_ylabel("mean cost after training")
    legend(axes)
    each = "response" if before.samples == 1 else f"{before.samples} responses"
    caption = (
        f"{len(kinds)} held-out prompts, one point each: the mean cost of its {each} before and after training. Below "
        "the diagonal the cost fell; dotted lines are the limit. Prompts beyond the axes lie on their edge. The "
        "corners count the points: prompts by their mean cost, not by how many of their responses are unsafe."
    )
    return figure, "Cost of each held-out prompt", caption
