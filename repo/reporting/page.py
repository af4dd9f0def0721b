"""Page: build the parts of a report as HTML. All text from a run goes through `escaped`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scoring.safety import is_safe
from .prompt_history import Entry
from .run_history import Record

if TYPE_CHECKING:
    from .figures import Drawn

PROMPT_LENGTH, RESPONSE_LENGTH = 300, 1500  # characters
SPARK_WIDTH, SPARK_HEIGHT, SPARK_POINTS = 104, 32, 60
SPARK_RANGE = 2, 98  # percentiles of all visits, beyond which lines are clipped
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

Pair = tuple[Record, Record]


def escaped(value: Any, most: int | None = None) -> str:
    """Escape text for an HTML element or a quoted attribute.

    Characters that HTML cannot hold become U+FFFD. most: characters to keep; None keeps all.
    """
    text = UNPRINTABLE.sub("\ufffd", str(value))
    if most is not None and len(text) > most:
        text = f"{text[:most]}… ({len(text) - most} more characters)"
    return html.escape(text)


def number(value: float | None, form: str = "{:.2f}") -> str:
    """Format a number with a typographic minus sign; – if it is None or not finite."""
    if value is None or not np.isfinite(value):
        return "–"
    text = form.format(value)
    if not any(c in "123456789" for c in text):
        text = text.removeprefix("-")
    return text.replace("-", "−")


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Build a list of (name, value)."""
    return f'<dl class="facts">{"".join(f"<div><dt>{a}</dt><dd>{escaped(b)}</dd></div>" for a, b in items)}</dl>'


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Build the tiles of large numbers. items: (name, value, earlier value), already escaped."""
    cells = (f"<div><dt>{name}</dt><dd>{value}</dd><dd>{was}</dd></div>" for name, value, was in items)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Build a table of texts, in which intervals in brackets are less prominent. rows: (name, cell, ...)."""
    head = "".join(f'<th scope="col">{escaped(c)}</th>' for c in columns)
    names = [escaped(column) for column in columns[1:]]
    lines = (
        f'<tr><th scope="row">{escaped(name)}</th>'
        + "".join(f'<td data-name="{n}">{_interval(cell)}</td>' for n, cell in zip(names, cells, strict=True))
        + "</tr>"
        for name, *cells in rows
    )
    return _scroll(
        f'<table class="stacked"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>', "Comparison"
    )


def _interval(cell: str) -> str:
    text = escaped(cell).replace("-", "−")
    return re.sub(r"\[.*\]", lambda m: f'<span class="interval">{m[0]}</span>', text)


def _scroll(content: str, label: str, kind: str = "scroll") -> str:
    """Wrap wide content so that it scrolls on its own, also by keyboard. label: its name for screen readers."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}">{content}</div>'


def bullets(sentences: Iterable[str]) -> str:
    """Build a bullet list of sentences."""
    return f"<ul>{''.join(f'<li>{escaped(s)}</li>' for s in sentences)}</ul>"


def figure(drawn: Drawn) -> str:
    """Build a figure with its title and caption."""
    caption = f"<figcaption>{escaped(drawn.caption)}</figcaption>"
    return f"<figure><h3>{escaped(drawn.title)}</h3>{drawn.svg}{caption}</figure>"


LEDGER_COLUMNS = (
    ("prompt", "text"),
    ("visits", "number"),
    ("cost history", ""),
    ("first cost", "number"),
    ("last cost", "number"),
    ("flips", "number"),
    ("unsafe", "number"),
    ("recent E{C−d}⁺", "number"),
)


REPEATED = {"visits", "cost history", "first cost", "flips"}
"""Columns that say nothing where each prompt was visited once."""


def ledger_table(entries: Sequence[Entry], limit: float) -> str:
    """Build a filter and a sortable table with a row for each prompt.

    entries: sorted by hardness, the last column. limit: the cost limit d.
    """
    heads = []
    once = all(len(e.visits) == 1 for e in entries)
    for name, kind in LEDGER_COLUMNS:
        if once and name in REPEATED:
            continue
        order = ' aria-sort="descending"' if name == LEDGER_COLUMNS[-1][0] else ""
        title = f'<button type="button">{name}</button>' if kind else f"<span>{name}</span>"
        heads.append(f'<th scope="col" data-kind="{kind}"{order}>{title}</th>')
    costs = [v.cost for e in entries for v in e.visits]
    low, high = np.percentile(costs, SPARK_RANGE)
    low, high = min(float(low), limit), max(float(high), limit)
    rows = "".join(_ledger_row(e, limit, low, high, once) for e in entries)
    search = (
        f'<label>Filter by prompt, category or id<input type="search" id="filter"></label>'
        f'<p id="count" role="status">{len(entries)} of {len(entries)} shown</p>'
    )
    content = f'<table id="ledger"><thead><tr>{"".join(heads)}</tr></thead><tbody>{rows}</tbody></table>'
    return search + _scroll(content, "Ledger of prompts", "scroll tall")


def _ledger_row(entry: Entry, limit: float, low: float, high: float, once: bool) -> str:
    """Build the row of a prompt. once: leave out what compares visits."""
    first, last = entry.visits[0], entry.visits[-1]
    text = escaped(entry.prompt, PROMPT_LENGTH)
    small = " · ".join(escaped(x, 80) for x in (entry.category, entry.id) if x)
    cells: tuple[tuple[float | str, str], ...] = (
        (len(entry.visits), str(len(entry.visits))),
        ("", spark([v.cost for v in entry.visits], limit, low, high, last.unsafe)),
        (first.cost, _cost(first.cost, limit)),
        (last.cost, _cost(last.cost, limit)),
        (entry.flips, str(entry.flips)),
        (entry.unsafe_share, f"{entry.unsafe_share:.0%}"),
        (entry.hardness, number(entry.hardness, "{:.3f}")),
    )
    named = zip(LEDGER_COLUMNS[1:], cells, strict=True)
    kept = (cell for (name, _), cell in named if not (once and name in REPEATED))
    rest = "".join(f'<td data-value="{_sortable(value)}">{shown}</td>' for value, shown in kept)
    value = escaped(entry.prompt.lower()[:40])
    return f'<tr><td data-value="{value}"><span dir="auto">{text}</span><small>{small}</small></td>{rest}</tr>'


def _sortable(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"


def _cost(cost: float, limit: float) -> str:
    return f'<span class="bad">{number(cost)}</span>' if not is_safe(cost, limit) else number(cost)


def spark(costs: Sequence[float], limit: float, low: float, high: float, unsafe: bool) -> str:
    """Draw the mean cost of each visit as a small line, with the limit dashed and the last visit as a dot.

    costs: mean cost of each visit. low, high: range of the vertical axis. unsafe: colours the dot.
    """
    values = np.array(costs, dtype=float)
    if len(values) > SPARK_POINTS:
        values = values[np.linspace(0, len(values) - 1, SPARK_POINTS).astype(int)]
    scale = SPARK_HEIGHT / ((high - low) or 1.0)
    x = np.linspace(0, SPARK_WIDTH, len(values)) if len(values) > 1 else np.array([SPARK_WIDTH])
    y = (high - np.clip(values, low, high)) * scale
    path = "M" + " ".join(f"{a:.0f},{b:.1f}" for a, b in zip(x, y, strict=True))
    level = f"{(high - limit) * scale:.1f}"
    label = f"mean cost at {len(costs)} visits, from {number(costs[0])} to {number(costs[-1])}"
    return (
        f'<svg class="spark" viewBox="0 0 {SPARK_WIDTH} {SPARK_HEIGHT}" role="img" aria-label="{label}">'
        f'<line x1="0" x2="{SPARK_WIDTH}" y1="{level}" y2="{level}"/><path d="{path}"/>'
        f'<circle class="{"unsafe" if unsafe else "safe"}" cx="{x[-1]:.0f}" cy="{y[-1]:.1f}" r="2.5"/></svg>'
    )


def pair_cards(pairs: Sequence[Pair], limit: float, names: tuple[str, str], titles: Sequence[str] = ()) -> str:
    """Build cards of prompts with two responses each, which open on demand.

    names: headings of the two responses. titles: one for each pair, shown with its scores; empty for none.
    """
    cards = []
    for (before, after), title in zip(pairs, titles or [""] * len(pairs), strict=True):
        sides = "".join(_side(r, limit, name) for r, name in zip((before, after), names, strict=True))
        scores = (
            *([escaped(title)] if title else []),
            f"cost {_cost(before['cost'], limit)} → {_cost(after['cost'], limit)}",
            (f"reward {number(before['reward'])} → {number(after['reward'])}"),
        )
        cards.append(_card(after, scores, sides))
    return f'<div class="pairs">{"".join(cards)}</div>'


def cards(records: Iterable[Record], limit: float) -> str:
    """Build cards of prompts with one response each. records: records of samples.jsonl."""
    built = (
        _card(
            r,
            (f"cost {_cost(r['cost'], limit)}", f"reward {number(r['reward'])}"),
            _side(r, limit, f"step {r['step'] + 1}"),
        )
        for r in records
    )
    return f'<div class="pairs">{"".join(built)}</div>'


def _card(record: Record, scores: Iterable[str], sides: str) -> str:
    where = [escaped(record[key], 80) for key in ("category", "id") if record[key]]
    line = "".join(f"<span>{s}</span>" for s in (*scores, *where))
    return (
        f'<details><summary><p class="text" dir="auto">{escaped(record["prompt"], 2 * PROMPT_LENGTH)}</p>'
        f'<p class="scores">{line}<span class="more">show responses</span></p></summary>'
        f'<div class="sides">{sides}</div></details>'
    )


def _side(record: Record, limit: float, name: str) -> str:
    safe = is_safe(record["cost"], limit)
    verdict = f'<span class="{"good" if safe else "bad"}">{"safe" if safe else "unsafe"}</span>'
    parts = [verdict, f"cost {number(record['cost'])}", f"reward {number(record['reward'])}"]
    if (judged := record.get("judge_safe")) is not None:
        parts.append(f"judge: {'safe' if judged else 'unsafe'}")
    if record.get("refusal"):
        parts.append("refusal")
    parts += [f"{key} {number(record[key])}" for key in ("repetition", "kl") if record.get(key) is not None]
    line = "".join(f"<span>{part}</span>" for part in parts)
    text = escaped(record["response"], RESPONSE_LENGTH)
    return f'<div><h4>{escaped(name)}</h4><p class="text" dir="auto">{text}</p><p class="scores">{line}</p></div>'
