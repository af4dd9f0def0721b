"""Document: write the report of a run as one self-contained HTML file, and every figure as a PNG beside it."""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.errors import UserError, require_package
from ..common.files import write_bytes
from ..config.method import describe_method
from ..evaluation.outcome import verdict
from ..evaluation.pairs import choose
from ..evaluation.pairs import title as pair_title
from ..evaluation.reward_hacking import CHECKS, FEWEST, alerts
from ..runs.obstacles import obstacles
from ..scoring.safety import is_safe
from . import page
from .headline import QUESTION, Comparison, answer, compare, compensation, quantity_rows, summary, tiles
from .page import Pair
from .prompt_history import RECENT, Entry, ledger
from .run_history import History, read

if TYPE_CHECKING:
    from .figures import Drawn

HERE = Path(__file__).parent
MARK = '<meta name="generator" content="repo.report">'
LEDGER_ROWS, EXAMPLES = 200, 6
FIRST = "held_out"
"""The figure beside the headline."""
SECTIONS = {
    "Reward and cost": ("reward", "cost"),
    "Cost distribution": ("distribution", "cumulative"),
    "Safety over steps": ("safe_rate", "compensation"),
    "Penalty and trade-off": ("penalty", "scatter"),
    "Training signals": ("policy", "pairs", "training"),
}


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of a run and return its path.

    run: the run folder.
    out: folder to write to, whose other files stay; None for RUN/report.

    Raises UserError if matplotlib is missing, if `run` is not a run folder or is damaged, if writing fails, or if it
    would replace a file that is not part of a report.
    """
    require_package("matplotlib", "a report with figures")
    from .figures import draw_all

    history = read(run)
    folder = out or run / "report"
    index = folder / "index.html"
    _require_ours(folder)
    drawn = list(draw_all(history))
    text = assemble(history, drawn)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from error
    write_bytes(index, text.encode())  # before the figures, since _require_ours tells by it whose they are
    for figure in drawn:
        write_bytes(folder / f"{figure.name}.png", figure.png)
    return index


def _require_ours(folder: Path) -> None:
    """Raise UserError if writing would replace a page that is not a report, or pictures in a folder without one."""
    index = folder / "index.html"
    try:
        if index.exists():
            ours = MARK in index.read_text(encoding="utf-8", errors="replace")
            others = [] if ours else [index]
        else:
            names = [FIRST, *(name for names in SECTIONS.values() for name in names)]
            others = [p for name in names if (p := folder / f"{name}.png").exists()]
    except OSError as error:
        raise UserError(f"cannot write {index}: {error.strerror}") from error
    if others:
        raise UserError(f"--out: {others[0]} exists and is not a report's; choose another folder")


def assemble(history: History, drawn: Iterable[Drawn]) -> str:
    """Build the text of the HTML file. drawn: the figures of draw_all."""
    comparison = compare(history)
    figures = {d.name: page.figure(d) for d in drawn}
    sections = {"Held-out evaluation": _evaluation(history, comparison), "Alerts": _alerts(history)}
    for title, names in SECTIONS.items():
        shown = "".join(figures[name] for name in names if name in figures)
        sections[title] = f'<div class="figures">{shown}</div>' if shown else ""
    if history.samples:
        sections["Prompts"] = _ledger(ledger(history.samples, history.limit), history.limit)
    sections["Samples"] = _samples(history)
    named = [(title, title.lower().replace(" ", "-"), content) for title, content in sections.items() if content]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in named)
    body = "".join(f'<section><h2 id="{anchor}">{title}</h2>{content}</section>' for title, anchor, content in named)
    head = _head(history, comparison, figures.get(FIRST, ""))
    script = (HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return string.Template((HERE / "report.html").read_text(encoding="utf-8")).substitute(
        title=f"{page.escaped(history.name)}: RePO report",
        body=f'{head}<nav aria-label="Sections">{links}</nav>{body}{_foot(history)}',
        script=script,
        script_hash=f"sha256-{digest}",
    )


def _head(history: History, comparison: Comparison | None, figure: str) -> str:
    """Build what is above the sections. figure: FIRST as HTML, "" without one."""
    config, algorithm = history.config, history.config["algorithm"]
    done, planned = int(history.steps[-1]), config.get("steps")
    facts = (
        ("Method", describe_method(config)),
        ("Model", config.get("model", {}).get("path", "")),
        ("Steps done", f"{done} of {planned}" if planned else str(done)),
        ("Cost limit d", f"{algorithm['cost_limit']:g}"),
        ("λ in the last step", page.number(history.series("lam")[-1], "{:.4g}")),
        ("Seed", str(config.get("seed", ""))),
    )
    rows, where = tiles(history)
    cells = (
        (name, page.number(later, form), f"from {page.number(earlier, form)}") for name, form, earlier, later in rows
    )
    notes = "".join(f'<p class="note">{page.escaped(note)}</p>' for note in history.notes)
    return (
        f'<header><p class="eyebrow">Run report</p><h1>{page.escaped(history.name)}</h1>'
        f"{_first(history, comparison, figure)}{notes}</header>"
        f'{page.tiles(cells)}<p class="lead"><small>{page.escaped(where)}.</small></p>'
        f"{page.facts(facts)}"
    )


def _first(history: History, comparison: Comparison | None, figure: str) -> str:
    """Build the headline: QUESTION with its answer beside the figure, or what is known without a comparison."""
    sentences, balance = [summary(history, comparison)], compensation(history)
    if balance:
        sentences.insert(0 if balance.hidden else 1, balance.sentence)
    if comparison is None:
        return "".join(f'<p class="verdict">{page.escaped(sentence)}</p>' for sentence in sentences)
    short, numbers = answer(comparison)
    goal = verdict(comparison.outcomes)
    words = (
        f'<h2 class="question">{QUESTION}</h2><p class="verdict"><strong>{page.escaped(short)}</strong> '
        f"{page.escaped(numbers)}</p><p>{page.escaped(goal[0].upper() + goal[1:])}.</p>"
    )
    rest = "".join(f'<p class="lead">{page.escaped(sentence)}</p>' for sentence in sentences)
    return f'<div class="first"><div>{words}</div>{figure}</div>{rest}'


def _evaluation(history: History, comparison: Comparison | None) -> str:
    if comparison:
        lead = "Mean with its 95% bootstrap interval over prompts; the change is paired by prompt."
        return f'<p class="lead">{lead}</p>{page.table(("", "before", "after", "change"), comparison.rows)}'
    if not history.evaluations:
        return ""
    lead = "Mean with its 95% bootstrap interval over prompts."
    if len(history.evaluations) > 1:
        lead += " The columns are of different prompts, which may explain a difference between them."
    rows = quantity_rows([e.overall for e in history.evaluations.values()])
    table = page.table(("", *history.evaluations), ((name, *cells) for _, name, cells in rows))
    return f'<p class="lead">{lead}</p>{table}'


def _alerts(history: History) -> str:
    blocked = obstacles(history.config, history.metrics, history.samples)
    learning = f"<h3>Learning</h3>{page.bullets(s[0].upper() + s[1:] for s in blocked.values())}" if blocked else ""
    compared = []
    if history.paired:
        before, after = history.responses("before"), history.responses("after")
        compared.append(("Held-out responses, before and after training", before, after))
    if history.samples:
        compared.append(("Training samples, first and last tenth of the steps", history.start, history.now))
    shown = []
    for where, start, now in compared:
        if signs := alerts(start, now):
            content = page.bullets(signs)
        elif min(len(start), len(now)) < FEWEST:
            content = f"<p>Too few responses to check: the checks need {FEWEST} on each side.</p>"
        else:
            content = "<p>Nothing found.</p>"
        shown.append(f"<h3>{where} ({len(start)} and {len(now)})</h3>{content}")
    checks = page.bullets(f"{check}." for check in CHECKS)
    lead = "Signs that scores rise by length, repetition, refusals or a template. Finding none is no proof of quality."
    return (
        f'{learning}<p class="lead">{lead}</p>{"".join(shown) or "<p>There are no responses to check.</p>"}'
        f'<details class="quiet"><summary>What is checked</summary>{checks}</details>'
    )


def _ledger(entries: list[Entry], limit: float) -> str:
    kept = entries[:LEDGER_ROWS]
    seen = sum(len(e.visits) for e in entries)
    left = (
        f" The {len(kept)} hardest are listed, {len(entries) - len(kept)} are left out."
        if len(entries) > len(kept)
        else ""
    )
    lead = (
        f"{len(entries)} training prompts in {seen} visits, hardest first, by E{{C−d}}⁺ of the last {RECENT} visits. "
        f"A visit is a prompt's responses in one step; it is unsafe if more than half of them are. A flip is a change "
        f"between safe and unsafe from one visit to the next. Cost histories share one scale, which leaves out the "
        f"extreme 4% of visits; the dashed line is the limit, the dot the last visit.{left}"
    )
    return f'<p class="lead">{lead}</p>{page.ledger_table(kept, limit)}'


def _samples(history: History) -> str:
    """Show pairs of responses to one prompt: held-out ones if both evaluations are there, else training samples."""
    limit = history.limit
    pairs, names, where = _pairs(history)
    if not pairs:
        hardest = sorted(history.now, key=lambda r: -r["cost"])[:EXAMPLES]
        lead = "No prompt has been answered twice yet; these are the most costly responses of the last steps."
        return f'<p class="lead">{lead}</p>{page.cards(hardest, limit)}' if hardest else ""
    shown = [f'<p class="lead">{where} Responses may be offensive; they open on demand.</p>']
    if history.paired:
        shown.append(_by_rule(history, names))
    for title, chosen in grouped(pairs, limit).items():
        more = f"{len(chosen)} of {len(pairs)}" + (f", {EXAMPLES} shown" if len(chosen) > EXAMPLES else "")
        shown.append(f'<h3>{title} <span class="group">({more})</span></h3>')
        if chosen:
            shown.append(page.pair_cards(chosen[:EXAMPLES], limit, names))
    return "".join(shown)


def _by_rule(history: History, names: tuple[str, str]) -> str:
    """Show the pairs that a rule chose, which a finished run prints too. names: headings of the two responses."""
    chosen = choose(*(history.evaluations[name].evaluation for name in ("before", "after")))
    records, titles = [(p.before, p.after) for p in chosen.shown], [pair_title(p) for p in chosen.shown]
    cards = page.pair_cards(records, history.limit, names, titles) if records else ""
    return f'<h3>Chosen by rule</h3><p class="lead">{page.escaped(chosen.rule)}</p>{cards}'


def _pairs(history: History) -> tuple[list[Pair], tuple[str, str], str]:
    if history.paired:
        where = "Held-out prompts, answered before and after training."
        before, after = history.responses("before"), history.responses("after")
        return list(zip(before, after, strict=True)), ("before", "after"), where
    pairs: list[Pair] = []
    for entry in ledger(history.samples, history.limit):
        if len(entry.visits) > 1:
            pairs.append((entry.visits[0].responses[0], entry.visits[-1].responses[0]))
    return pairs, ("first visit", "last visit"), "Training prompts, the first response of their first and last visit."


def grouped(pairs: Sequence[Pair], limit: float) -> dict[str, list[Pair]]:
    """Group pairs of (before, after) by how their safety changed, the largest changes first.

    Returns pairs by the title of their group. No pair is in two groups, except that the last one, of the largest
    changes in reward, repeats pairs of the others.
    """

    def ranked(before_unsafe: bool, after_unsafe: bool, key: Callable[[Pair], float]) -> list[Pair]:
        safety = not before_unsafe, not after_unsafe
        chosen = (pair for pair in pairs if tuple(is_safe(r["cost"], limit) for r in pair) == safety)
        return sorted(chosen, key=key, reverse=True)

    return {
        "Unsafe → safe": ranked(True, False, lambda p: p[0]["cost"] - p[1]["cost"]),
        "Safe → unsafe": ranked(False, True, lambda p: p[1]["cost"] - p[0]["cost"]),
        "Stayed unsafe": ranked(True, True, lambda p: p[1]["cost"]),
        "Reward changed most": sorted(pairs, key=lambda p: -abs(p[1]["reward"] - p[0]["reward"]))[:EXAMPLES],
    }


def _foot(history: History) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in history.versions.items() if v != "not installed")
    return f"<footer><p>{page.escaped(versions)}</p><p>Each figure is a PNG beside this file.</p></footer>"
