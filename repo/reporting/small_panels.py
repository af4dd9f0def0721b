"""Small panels: metrics of a run over its steps, two panels in a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from .run_history import History
from .style import INK, NOW, WIDTH, describe_points, step_axis, trend

POLICY = (  # (key, title, factor) of each panel
    ("kl", "KL to reference, nats/token", 1),
    ("entropy", "entropy, nats/token", 1),
    ("length", "response length, tokens", 1),
    ("clip_frac", "clipped ratios, %", 100),
)
PAIRS = (
    ("loss", "loss of a pair, nats", 1),
    ("pair_accuracy", "moved towards the better, %", 100),
    ("pair_margin", "margin β Δ", 1),
    ("pair_log_ratio", "log π/π_ref of a response, nats", 1),
    ("pair_confidence", "confidence of the labels, %", 100),
)
TRAINING = (
    ("grad_norm", "gradient norm", 1),
    ("tokens_per_second", "sampling, tokens/s", 1),
    ("reward_explained_variance", "reward critic, expl. var.", 1),
    ("cost_explained_variance", "cost critic, expl. var.", 1),
    ("credit_explained_variance", "credit of tokens, expl. var.", 1),
)


def draw_small(
    history: History, panels: Sequence[tuple[str, str, float]], title: str
) -> tuple[Figure, str, str] | None:
    """Draw the metrics that the run has, with title and caption; None if it has none of them."""
    known = [p for p in panels if np.isfinite(metric_of(history, p[0])).any()]
    if not known:
        return None
    rows = -(-len(known) // 2)
    figure = Figure(figsize=(WIDTH, 1.6 * rows + 0.4))
    grid, steps = figure.subplots(rows, 2, sharex=True, squeeze=False), 0
    for axes, (key, name, scale) in zip(grid.flat, known, strict=False):
        values = scale * metric_of(history, key)
        drawn = np.isfinite(values) | history.measured
        steps = max(steps, int(drawn.sum()))
        trend(axes, history.steps[drawn], values[drawn], NOW, "")
        if (cap := _cap(history, key)) is not None:
            axes.axhline(cap, color=INK, lw=1, ls=":")
            name = f"{name} (of {cap:g})"
        if np.nanmin(values) >= 0:
            axes.set_ylim(0, 1.05 * max(np.nanmax(values), cap or 0) or 1.0)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=9)
    for axes in grid.flat[len(known) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        step_axis(axes, 4)
    return figure, title, f"Training batches: {describe_points(steps)}"


def _cap(history: History, key: str) -> float | None:
    """Return the limit that the configuration sets to a metric, None if it sets none."""
    rollout = history.config.get("rollout", {})
    # "max_new_tokens" is the name that version 0.1 wrote
    return rollout.get("max_response_tokens", rollout.get("max_new_tokens")) if key == "length" else None


def metric_of(history: History, key: str) -> np.ndarray:
    """Return a metric by step, (S,). A missing length is computed from the step's response tokens and samples."""
    written = history.series(key)
    if key != "length" or np.isfinite(written).all():
        return written
    per_step = {r["step"]: 0 for r in history.metrics}
    for sample in history.samples:
        per_step[sample["step"]] = per_step.get(sample["step"], 0) + 1
    counts = np.array([per_step[r["step"]] for r in history.metrics], dtype=float)
    counted = history.series("response_tokens") / np.where(counts > 0, counts, np.nan)
    return np.where(np.isfinite(written), written, counted)
