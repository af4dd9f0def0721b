"""Style the figures of a report alike, and export them as PNG on white and as SVG in the page's colours.

Colours differ in lightness as well as in hue (after Okabe and Ito), and no two lines differ in colour alone.
"""

from __future__ import annotations

import io
import re

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator

# name of the CSS variable -> colour on white
COLOURS = {
    "ink": "#1c2024",
    "muted": "#646b73",
    "grid": "#e3e6ea",
    "now": "#0062a3",
    "start": "#737b84",
    "bad": "#c2410c",
    "good": "#00795a",
}
INK, MUTED, GRID, NOW, START, BAD, GOOD = COLOURS.values()
POINTS, BINS = 250, 24
WIDTH = 4.7  # inches: text of 10 points stays readable on a phone
STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a name is a $
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def panel(height: float = 2.9) -> tuple[Figure, Axes]:
    """Make a figure with one panel over steps. height: inches."""
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.subplots()
    step_axis(axes)
    return figure, axes


def step_axis(axes: Axes, ticks: int = 8) -> None:
    """Label the x axis with whole steps. ticks: most ticks."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def trend(
    axes: Axes, steps: np.ndarray, values: np.ndarray, colour: str, label: str, line: str = "-", points: bool = True
) -> None:
    """Draw a running mean as a line, and each step's value as a light point if `points`.

    steps, values: (S,). line: matplotlib's line style.
    """
    if points:
        axes.plot(*thinned(steps, values, POINTS), "o", color=colour, ms=3, mew=0, alpha=0.45)
    single = "o" if len(steps) == 1 else None
    axes.plot(*thinned(steps, running_mean(values, window(len(steps)))), line, color=colour, label=label, marker=single)


def window(steps: int) -> int:
    """Choose how many steps a running mean covers. steps: steps of the run."""
    return max(1, min(steps // 4, max(5, steps // 20)))


def describe_points(steps: int) -> str:
    """Say what points and lines of `trend` are. steps: steps that are drawn."""
    points = "points are steps" if steps <= POINTS else f"points are {POINTS} of {steps} steps"
    return f"{points}, lines the mean of the last {window(steps)}." if window(steps) > 1 else f"{points}."


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Average the known values among the last `width` ones.

    values: (S,), NaN if not known. Returns (S,), NaN if none is known and at the start, until half of `width` is there.
    """
    known = np.isfinite(values)
    sums, counts = (np.cumsum(np.r_[0, x]) for x in (np.where(known, values, 0), known))
    end = np.arange(1, len(values) + 1)
    first = np.maximum(end - width, 0)
    n = counts[1:] - counts[first]
    return np.where((n > 0) & (2 * end >= width), (sums[1:] - sums[first]) / np.maximum(n, 1), np.nan)


def log_axis(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers: STYLE turns off the mathtext of the default ones."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter())


def thinned(x: np.ndarray, y: np.ndarray, most: int = 2 * POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most `most` points, evenly spaced, with both ends. x, y: (n,)."""
    if len(x) <= most:
        return x, y
    kept = np.linspace(0, len(x) - 1, most).astype(int)
    return x[kept], y[kept]


def edges_of(costs: np.ndarray, limit: float) -> np.ndarray:
    """Return the edges of equal bins that cover the 0.5th to the 99.5th percentile of costs; the limit is an edge."""
    low, high = np.percentile(costs, [0.5, 99.5])
    low, high = min(low, limit), max(high, limit)
    width = (high - low) / BINS or 1.0
    return limit + width * np.arange(np.floor((low - limit) / width) - 1, np.ceil((high - limit) / width) + 2)


def mark_limit(axes: Axes, limit: float, edges: np.ndarray) -> None:
    """Draw the limit, shade the unsafe side, and set and label the x axis. edges: edges of the bins."""
    axes.axvspan(limit, edges[-1], color=BAD, alpha=0.08, lw=0)
    axes.axvline(limit, color=INK, lw=1, ls=":")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(f"cost (limit d = {limit:g})")


def legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 3 if len(labels) < 4 and sum(map(len, labels)) <= 34 else 2  # as many as fit the width
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2)


def png(figure: Figure) -> bytes:
    """Render the figure as PNG on white, for other documents."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=144, facecolor="white")
    return file.getvalue()


def svg(figure: Figure, name: str, title: str) -> str:
    """Render the figure as an <svg> element with the page's colours and font and the width of its container.

    name: prefix that makes ids unique in the page. title: text for screen readers.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    kept = set(re.findall(r"[\"(]#([^\")]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in kept else "", body)
    body = re.sub(r'href="#|url\(#', lambda m: f"{m[0]}{name}-", body).replace("xlink:href", "href")
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"font-family: [^;\"]*; ?", "", body)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)  # a hundredth of a point is enough
    body = re.sub(r"\s*\n\s*", "\n", body)
    return f'<svg {box[0]} role="img" aria-label="{title}">{body.strip()}'
