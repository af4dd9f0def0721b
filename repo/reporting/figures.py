"""Draw the figures of a report, with captions that say what each shows and over which responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config.schema import BOUNDED, PAIRED
from ..scoring.safety import is_safe
from .held_out import held_out
from .run_history import History, column
from .small_panels import PAIRS, POLICY, TRAINING, draw_small
from .style import (
    BAD,
    GOOD,
    INK,
    NOW,
    START,
    STYLE,
    WIDTH,
    describe_points,
    edges_of,
    legend,
    log_axis,
    mark_limit,
    panel,
    png,
    step_axis,
    svg,
    thinned,
    trend,
)

SCATTERED = 400  # most responses drawn on each side of the scatter plot


@dataclass(frozen=True)
class Drawn:
    """A drawn figure.

    name: name of its PNG file. title: heading. caption: what it shows, over which responses. svg: <svg> element for the
    page. png: content of the PNG file.
    """

    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def draw_all(history: History) -> Iterator[Drawn]:
    """Draw every figure for which the run has numbers."""
    draws: Sequence[Callable[[History], tuple[Figure, str, str] | None]] = (
        _held_out,
        _reward,
        _cost,
        _distribution,
        _cumulative,
        _safe_rate,
        _compensation,
        _penalty,
        _scatter,
        _policy,
        _pairs,
        _training,
    )
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignore the user's own matplotlib settings
        matplotlib.rcParams.update(STYLE)
        for draw in draws:
            if (parts := draw(history)) is not None:
                figure, title, caption = parts
                figure.draw_without_rendering()
                figure.set_layout_engine("none")  # keep this layout for both the PNG and the SVG
                name = draw.__name__[1:]
                yield Drawn(name, title, caption, svg(figure, name, title), png(figure))


def _held_out(history: History) -> tuple[Figure, str, str] | None:
    return held_out(history)


def _reward(history: History) -> tuple[Figure, str, str]:
    figure, axes = panel()
    _over_steps(axes, history, "reward_mean", NOW, "all responses")
    _over_steps(axes, history, "reward_safe_mean", GOOD, "safe responses", "--", points=False)
    axes.set_ylabel("mean reward")
    legend(axes)
    return figure, "Reward", f"Training batches: {_drawing(history)}"


def _cost(history: History) -> tuple[Figure, str, str]:
    figure, axes = panel()
    _over_steps(axes, history, "cost_mean", NOW, "E[C]")
    _over_steps(axes, history, "rectified_cost", BAD, "E{C−d}⁺", "--", points=False)
    axes.axhline(history.limit, color=INK, lw=1, ls=":", label=f"limit d = {history.limit:g}")
    axes.set_ylabel("cost")
    legend(axes)
    return figure, "Cost", f"Training batches: {_drawing(history)} The limit applies to every prompt, not to the mean."


def _safe_rate(history: History) -> tuple[Figure, str, str]:
    figure, axes = panel()
    _over_steps(axes, history, "safe_rate", GOOD, "responses with C ≤ d", scale=100)
    caption = f"Training batches: {_drawing(history)}"
    if history.samples_per_prompt > 1:
        _over_steps(axes, history, "prompts_mostly_unsafe", BAD, "prompts mostly unsafe", "--", points=False, scale=100)
        caption += " Mostly unsafe: more than half of the responses."
    for value, marker, label in ((1, "o", "gate, validation prompts: accepted"), (0, "x", "gate: taken back")):
        if (at := history.series("gate_accepted") == value).any():
            axes.plot(history.steps[at], 100 * history.series("gate_safe_rate")[at], marker, color=INK, label=label)
    axes.set(ylim=(0, 102), ylabel="%")
    legend(axes)
    return figure, "Safe rate", caption


def _compensation(history: History) -> tuple[Figure, str, str]:
    figure, axes = panel()
    _over_steps(axes, history, "compensation_gap", NOW, "E{C−d}⁺ − {E[C]−d}⁺")
    axes.set(ylim=(0, None), ylabel="compensation gap")
    legend(axes)
    words = "What the mean hides: it is 0 only if no safe response pays for an unsafe one."
    return figure, "Compensation gap", f"{words} Training batches: {_drawing(history)}"


def _penalty(history: History) -> tuple[Figure, str, str]:
    ratio = history.series("reward_cost_grad_ratio")
    with np.errstate(invalid="ignore"):
        known = bool((ratio > 0).any())
    moves = bool(np.isfinite(history.series("limit")).any())
    figure = Figure(figsize=(WIDTH, 4.0 + 1.6 * (known + moves)))
    panels = figure.subplots(2 + known + moves, 1, sharex=True)
    panels[0].plot(*thinned(history.steps, history.series("lam")), color=NOW)
    panels[0].set_title("λ used in the step")
    algorithm, cap = history.config["algorithm"], history.config.get("penalty", {}).get("max")
    if cap is not None and algorithm["method"] in BOUNDED and np.isfinite(cap):
        panels[0].axhline(cap, color=INK, lw=1, ls=":")
        panels[0].set_title(f"λ used in the step (dotted: its cap {cap:g})")
    panels[0].set_ylim(bottom=0)
    _over_steps(panels[1], history, "safe_rate", BAD, "", scale=-100, offset=100)
    hinge = algorithm["method"] in ("repo", "repo_dpo") and algorithm.get("cost_mode") != "barrier" and not moves
    responses = "rectified" if hinge else "unsafe"
    panels[1].set_title(f"{responses} responses, C > d (%)")
    panels[1].set_ylim(0, 102)
    often = "in the steps that sample the policy" if algorithm["method"] in PAIRED else "once per batch"
    caption = f"λ moves {often}. Training batches: {_drawing(history)}"
    if moves:
        panels[2].plot(*thinned(history.steps, history.series("limit")), color=NOW)
        panels[2].axhline(history.limit, color=INK, lw=1, ls=":")
        panels[2].set_title(f"limit used in the step (dotted: the run's limit d = {history.limit:g})")
        caption += " λ moves by the limit used in the step; all other figures are of the run's limit."
    if known:
        last = panels[-1]
        log_axis(last)
        _over_steps(last, history, "reward_cost_grad_ratio", GOOD, "")
        last.axhline(1, color=INK, lw=1, ls=":")
        last.set_title("gradient norms, reward ÷ λ cost (log)")
        caption += " The norms are L2, over the log-probabilities of response tokens; below 1 the cost dominates."
    step_axis(panels[-1])
    return figure, "Penalty", caption


def _curves(history: History) -> list[tuple[str, np.ndarray, str, str, str]]:
    """List (label, costs, colour, line style, description) of up to four sets of responses whose costs are compared.

    The held-out responses before training are left out if those after training are to other prompts.
    """
    n = history.tenth
    span = "step" if n == 1 else f"{n} steps"
    before, after = history.responses("before"), history.responses("after")
    if before and after and not history.paired:
        before = []  # to other prompts than those after training
    same = "the same held-out prompts" if history.paired else "held-out prompts"
    sides = (
        ("start, training", history.start, START, "--", f"first {span} of training"),
        ("now, training", history.now, NOW, "--", f"last {span} of training"),
        ("reference, held out", before, START, "-", "held-out prompts before training"),
        ("now, held out", after, NOW, "-", f"{same} after training"),
    )
    curves = []
    for label, records, colour, line, where in sides:
        costs = column(records, "cost")
        if len(costs):
            prompts = len({r["id"] for r in records})
            over = f"{label}: {len(records)} responses to {prompts} prompts, {where}"
            curves.append((label, costs, colour, line, over))
    return curves


def _distribution(history: History) -> tuple[Figure, str, str] | None:
    curves = _curves(history)
    if not curves:
        return None
    figure, axes = panel(3.4)
    edges = edges_of(np.concatenate([c[1] for c in curves]), history.limit)
    for label, costs, colour, line, _ in curves:
        # right-closed bins: a cost at the limit is safe
        counts = np.histogram(-np.clip(costs, edges[0], edges[-1]), -edges[::-1])[0][::-1]
        axes.stairs(100 * counts / len(costs), edges, color=colour, ls=line, lw=1.6, label=label)
    mark_limit(axes, history.limit, edges)
    axes.set_ylabel("% of responses")
    legend(axes)
    ends = "Costs beyond the axis are in the outermost bins."
    return figure, "Distribution of costs", f"{'; '.join(c[4] for c in curves)}. {ends}"


def _cumulative(history: History) -> tuple[Figure, str, str] | None:
    curves = _curves(history)
    if not curves:
        return None
    figure, axes = panel(3.4)
    edges = edges_of(np.concatenate([c[1] for c in curves]), history.limit)
    for label, costs, colour, line, _ in curves:
        x, share = np.sort(costs), 100 * np.arange(1, len(costs) + 1) / len(costs)
        axes.step(*thinned(np.r_[edges[0], x, edges[-1]], np.r_[0, share, 100]), where="post", color=colour, ls=line)
        axes.lines[-1].set_label(label)
    mark_limit(axes, history.limit, edges)
    axes.set_ylabel("% of responses at most")
    legend(axes)
    safe = "; ".join(f"{label} {is_safe(costs, history.limit).mean():.0%}" for label, costs, *_ in curves)
    caption = f"The height at the limit is the safe rate: {safe}. Same responses as in the distribution of costs."
    return figure, "Cumulative costs", caption


def _scatter(history: History) -> tuple[Figure, str, str] | None:
    if history.paired:
        sides = (history.responses("before"), history.responses("after"))
        where = "held-out prompts before and after training"
    elif history.samples:
        sides, where = (history.start, history.now), "training prompts, first and last tenth of steps"
    else:
        return None
    figure = Figure(figsize=(WIDTH, 3.4))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    edges = edges_of(np.concatenate([column(side, "cost") for side in sides]), history.limit)
    shown = []
    for axes, records, title in zip(panels, sides, ("start", "now"), strict=True):
        kept = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, SCATTERED).astype(int))]
        cost, reward = np.clip(column(kept, "cost"), edges[0], edges[-1]), column(kept, "reward")
        safe = is_safe(cost, history.limit)
        for chosen, colour, marker in ((safe, NOW, "o"), (~safe, BAD, "D")):
            axes.plot(cost[chosen], reward[chosen], marker, color=colour, ms=3.2, mew=0, alpha=0.6)
        share = is_safe(column(records, "cost"), history.limit).mean()
        axes.set_title(f"{title}: {share:.0%} safe")
        mark_limit(axes, history.limit, edges)
        shown.append(f"{len(kept)} of {len(records)}")
    panels[0].set_ylabel("reward")
    caption = f"Responses to {where}; {shown[0]} and {shown[1]} shown, evenly spaced. Unsafe is right of the limit."
    return figure, "Reward against cost", caption


def _policy(history: History) -> tuple[Figure, str, str] | None:
    return draw_small(history, POLICY, "Policy")


def _pairs(history: History) -> tuple[Figure, str, str] | None:
    on_pairs = np.isfinite(history.series("pair_accuracy")).any()
    return draw_small(history, PAIRS, "Pairs") if on_pairs else None


def _training(history: History) -> tuple[Figure, str, str] | None:
    return draw_small(history, TRAINING, "Optimiser, speed, critics")


def _over_steps(
    axes: Axes,
    history: History,
    key: str,
    colour: str,
    label: str,
    line: str = "-",
    points: bool = True,
    scale: float = 1,
    offset: float = 0,
) -> None:
    values = history.series(key)
    known = np.isfinite(values) | history.measured
    trend(axes, history.steps[known], offset + scale * values[known], colour, label, line, points)


def _drawing(history: History) -> str:
    return describe_points(int(history.measured.sum()))
