"""Draw the figures of measured results: bars against the machine's limit, a roofline, curves over sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.harness.results import LIMIT, OURS, PEER, Case, Row
from benchmarks.workloads.training_step import SAMPLES, TOKENS
from repo.reporting.style import BAD, INK, NOW, START, STYLE, png

PANELS = (
    ("loss", "fp32"),
    ("loss", "bf16"),
    ("logprobs", "fp32 logits, with gradient"),
    ("linear", "fp32, N = 1024"),
    ("step", "embedded"),
    ("train_vs_trl", "embedded"),
)
TITLES = {
    "loss": "Loss and gradient from logits",
    "logprobs": "Log-probabilities",
    "linear": "From hidden states",
    "step": "Parts of a training step",
    "train_vs_trl": "Training",
}


def find(cases: Sequence[Case], suite: str, name: str) -> Case | None:
    """Return the case of a suite with this name, or None."""
    return next((case for case in cases if (case.suite, case.name) == (suite, name)), None)


def sweep(cases: Sequence[Case], suite: str, start: str) -> list[tuple[float, Case]]:
    """Return (last number in the name, case) of the cases whose name has this start, in the order of the numbers."""
    points = [case for case in cases if case.suite == suite and case.name.startswith(start)]
    return sorted(((float(re.findall(r"\d+", case.name)[-1]), case) for case in points), key=lambda pair: pair[0])


def draw(cases: Sequence[Case]) -> dict[str, bytes]:
    """Return the PNG of every figure for which there are results, by name."""
    figures = {"bars": bars, "roofline": roofline, "scaling": scaling}
    with matplotlib.rc_context(STYLE):
        drawn = {name: figure(cases) for name, figure in figures.items()}
        return {name: png(figure) for name, figure in drawn.items() if figure is not None}


def bars(cases: Sequence[Case]) -> Figure | None:
    """Draw the share of the machine's limit that each way reaches, a panel per case."""
    chosen = [case for suite, name in PANELS if (case := find(cases, suite, name)) is not None]
    if not chosen:
        return None
    height = max(sum(_shown(row) for row in case.rows) for case in chosen)
    rows = -(-len(chosen) // 2)
    figure = Figure(figsize=(11, rows * (0.9 + 0.27 * height)))
    for axes, case in zip(figure.subplots(rows, 2, squeeze=False).flat, chosen, strict=False):
        _bar_panel(axes, case)
    for axes in figure.axes[len(chosen) :]:
        axes.set_axis_off()
    return figure


def _shown(row: Row) -> bool:
    return bool(row.rate) and row.role != LIMIT


def _bar_panel(axes: Axes, case: Case) -> None:
    rows = [row for row in case.rows if _shown(row)]
    peak = case.peak_rate
    values = [100 * (row.rate or 0) / peak if peak else 3600 * (row.rate or 0) for row in rows]
    drawn = axes.barh(range(len(rows)), values, color=[NOW if row.role == OURS else START for row in rows], height=0.7)
    axes.bar_label(drawn, [f"{value:.0f}" for value in values], padding=3, color=INK, fontsize=9)
    axes.set_yticks(range(len(rows)), [row.way for row in rows], fontsize=9)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    if peak:
        axes.axvline(100, color=BAD, lw=1.5)
        axes.set_xlabel("% of the machine's limit: " + ("a copy" if case.unit == "bytes" else "matrix products"))
        axes.set_xlim(0, max(115, 1.12 * max(values)))
    else:
        axes.set_xlabel("samples per hour" if case.unit == "samples" else case.unit)
        axes.set_xlim(0, 1.15 * max(values))
    axes.set_title(f"{TITLES.get(case.suite, case.suite)}: {case.name}")


def roofline(cases: Sequence[Case]) -> Figure | None:
    """Draw operations per second over operations per necessary byte, under the measured copy and GEMM rates."""
    step, decode = find(cases, "step", "embedded"), find(cases, "step", "embedded, decode")
    linear = find(cases, "linear", "fp32, N = 1024")
    if step is None or decode is None or not step.peak_rate or not decode.peak_rate:
        return None
    figure = Figure(figsize=(6.4, 4))
    axes = figure.subplots()
    bandwidth, peak = decode.peak_rate, step.peak_rate
    ridge = peak / bandwidth
    axes.plot([1, ridge, 2000], [bandwidth / 1e9, peak / 1e9, peak / 1e9], color=BAD, lw=1.5)
    axes.annotate(f"copy {bandwidth / 1e9:.0f} GB/s", (2, 2 * bandwidth / 1e9), rotation=38, color=BAD, va="bottom")
    axes.annotate(f"GEMM {peak / 1e9:.0f} GFLOP/s", (120, peak / 1e9), color=BAD, va="bottom")
    for name, row, moved in _points(step, decode, linear):
        assert row.work is not None
        role = NOW if row.role == OURS else START
        x, y = row.work / moved, row.work / row.time.median / 1e9
        axes.plot(x, y, "o" if row.role == OURS else "s", color=role)
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, -12), fontsize=8, color=role)
    axes.set(xscale="log", yscale="log", xlabel="operations per necessary byte", ylabel="GFLOP/s")
    _plain_numbers(axes)
    return figure


def _points(step: Case, decode: Case, linear: Case | None) -> list[tuple[str, Row, float]]:
    """Return (name, row whose work is operations, bytes that it must move at least)."""
    points = []
    for row in step.rows:
        bytes_ = decode.row(row.way)
        if row.work and row.seconds and bytes_ is not None and bytes_.work:
            points.append((row.way, row, bytes_.work))
    weights = next(row.work for row in decode.rows if row.role == OURS and row.work) / TOKENS
    update = step.row("update")
    if update is not None and update.seconds:
        # Weights in both passes, their gradients, and what AdamW reads and writes: 40 bytes a weight in fp32.
        points.append(("update", update, 13 * weights))
    if linear is not None:
        n, h, v = (linear.parameters[name] for name in ("tokens", "hidden", "vocabulary"))
        # The head, its gradient, hidden states and their gradient.
        points += [
            (r.way, r, 4.0 * (2 * v * h + 2 * n * h)) for r in linear.rows if r.role == OURS and "head" not in r.way
        ]
    return points


def scaling(cases: Sequence[Case]) -> Figure | None:
    """Draw rates over sizes, and peak memory over tokens."""
    panels = (
        ("loss, V", "vocabulary", "GB/s at 2 NVe"),
        ("loss, N", "tokens (V = 8192)", "GB/s at 2 NVe"),
        ("linear, N", "tokens (V = 49 152)", "GFLOP/s"),
        ("update, batch", f"responses of {TOKENS} tokens", "GFLOP/s"),
        ("update, prompts", f"tokens of each of 2 prompts ({SAMPLES} responses)", "GFLOP/s"),
    )
    curves = [(sweep(cases, "scaling", start), xlabel, ylabel) for start, xlabel, ylabel in panels]
    memory = sweep(cases, "memory", "hidden states")
    if not any(points for points, *_ in curves):
        return None
    figure = Figure(figsize=(11, 6.4))
    panels_of = list(figure.subplots(2, 3).flat)
    for axes, (points, xlabel, ylabel) in zip(panels_of, curves, strict=False):
        _curves(axes, points, lambda row: row.rate / 1e9 if row.rate else None)
        axes.set(xscale="log", xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        _plain_numbers(axes, y=False)
    _curves(panels_of[-1], memory, lambda row: row.extra_peak / 1e6 if row.extra_peak is not None else None)
    panels_of[-1].set(xscale="log", yscale="log", xlabel="tokens (V = 49 152)", ylabel="extra peak, MB")
    panels_of[-1].set_ylim(top=1e6)  # room for the legend
    _plain_numbers(panels_of[-1])
    return figure


def _curves(axes: Axes, points: Sequence[tuple[float, Case]], value) -> None:
    """Draw a line per way. The limits are one line, the best at each point."""
    lines: dict[str, list[tuple[float, float]]] = {}
    roles: dict[str, str] = {}
    for x, case in points:
        best: dict[str, float] = {}
        for row in case.rows:
            if (y := value(row)) is not None:
                name = "the machine's limit" if row.role == LIMIT and row.seconds else row.way
                best[name], roles[name] = max(best.get(name, 0), y), row.role
        for name, y in best.items():
            lines.setdefault(name, []).append((x, y))
    styles = iter(("--", ":", "-.", (0, (1, 2)), (0, (5, 1)), (0, (3, 1, 1, 1))) * 2)
    for name, line in lines.items():
        colour = {OURS: NOW, LIMIT: BAD}.get(roles[name], START)
        style = next(styles) if roles[name] == PEER else "-"
        axes.plot(*zip(*line, strict=True), ls=style, color=colour, label=name, marker="o", ms=3)
    if lines:
        axes.legend(fontsize=7 if len(lines) < 6 else 6, loc="best")


def _plain_numbers(axes: Axes, y: bool = True) -> None:
    for axis in (axes.xaxis, axes.yaxis) if y else (axes.xaxis,):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}" if v < 1000 else f"{v / 1000:g}k"))
        axis.set_minor_locator(NullLocator())
