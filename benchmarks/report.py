"""Markdown and figures from committed results; the README's figures among them.

    python -m benchmarks.report                               # every machine in benchmarks/results
    python -m benchmarks.report --readme README.md            # and the part of a file between the two markers

Writes report.md, bars.png, roofline.png and scaling.png beside the JSON of a machine, and gpu_static.png, which is
modelled, beside that of gpu_static. Nothing is measured here, and nothing is told
of a machine without results.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.machine import ROOT, told
from benchmarks.harness.results import FOLDER, LIMIT, OURS, PEER, Case, ratio, read
from benchmarks.reporting import charts
from benchmarks.reporting.tables import case_table, milliseconds

BEGIN, END = "<!-- benchmarks: written by python -m benchmarks.report --readme -->", "<!-- end of benchmarks -->"
SUITES = ("loss", "logprobs", "linear", "memory", "step", "train_vs_trl", "checkpoint", "scaling")
HEADLINES = (
    ("loss", "fp32", "loss and gradient from logits, fp32"),
    ("loss", "fp32, glibc's default allocator", "the same, glibc's default allocator"),
    ("loss", "bf16", "the same, bf16"),
    ("loss", "fp32, entropy with gradient", "the same with the entropy and its gradient, fp32"),
    ("loss", "bf16, full KL", "the same with full KL, bf16"),
    ("logprobs", "fp32 logits, values", "log-probabilities from logits, fp32"),
    ("logprobs", "fp32 logits, with gradient", "the same with the gradient"),
    ("linear", "fp32, N = 1024", "loss and gradients from hidden states, fp32"),
    ("linear", "fp32, glibc's default allocator", "the same, glibc's default allocator"),
    ("linear", "bf16, N = 8192", "loss and gradients from hidden states, bf16"),
    ("logprobs", "hidden states, values", "log-probabilities from hidden states"),
    ("logprobs", "hidden states, with gradients", "the same with gradients"),
    ("step", "embedded", "update of the default run"),
    ("train_vs_trl", "embedded", "a training step beside TRL's GRPOTrainer"),
)


def machines(folder: Path) -> dict[Path, list[Case]]:
    """Folders with results, and those, in the order of the suites."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if not any(path.glob("*.json")):
            continue
        cases = read(path)
        found[path] = sorted(cases, key=lambda c: SUITES.index(c.suite) if c.suite in SUITES else len(SUITES))
    return found


def headline(case: Case, title: str) -> str:
    """One row: our time, share of the limit, every peer's time over ours, error and peaks."""
    row = case.row(case.subject)
    assert row is not None
    share = f"{row.rate / case.peak_rate:.0%}" if row.rate and case.peak_rate else ""
    peers = []
    for other in case.rows:
        same = other.role == PEER and other.work == row.work
        found = ratio(case, other.way) if same else None
        if found is not None:
            peers.append(f"{other.way} {found.median:.2f}")
    error = f"{row.error:.0e}" if row.error is not None else ""
    peak = f"{row.extra_peak / 1e6:.0f}" if row.extra_peak is not None else ""
    return f"| {title} | {milliseconds(row)} | {share} | {'; '.join(peers)} | {error} | {peak} |"


def summary(cases: Sequence[Case]) -> str:
    """The table of headlines."""
    lines = [
        "| | ours, median [quartiles] | of the limit | time of a peer ÷ ours | error to fp64 | extra peak, MB |",
        "|---|---|---|---|---|---|",
    ]
    for suite, name, title in HEADLINES:
        case = charts.find(cases, suite, name)
        if case is not None and case.row(case.subject) is not None:
            lines.append(headline(case, title))
    return "\n".join(lines)


def measured_on(cases: Sequence[Case]) -> str:
    """Where, when and at which commits."""
    loads = sorted({case.provenance["load"] for case in cases})
    commits = sorted({case.provenance["commit"] for case in cases})
    first = told(cases[0].provenance).split(", load")[0]
    packages = told(cases[0].provenance).split("; ")[1]
    dates = sorted(case.provenance["date"][:10] for case in cases)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    load = f"load before a run {', '.join(f'{value:g}' for value in loads)}"
    return f"{first}, {load}; {packages}; {when}, commits {', '.join(commits)}."


def report(folder: Path, cases: Sequence[Case], figures: Sequence[str]) -> str:
    """The whole report of a machine."""
    parts = [f"# Benchmarks: {cases[0].provenance['processor']}", measured_on(cases)]
    parts.append(
        "Ways of a case take turns in one process (trainings: in processes of their own); times are medians with "
        "quartiles, ratios are formed within a round. What has an error was compared with fp64 on a small problem "
        "before it was timed. The limit is the best copy or matrix product of the same case. Freed memory is kept "
        "while a case is timed, unless the case is named after the default allocator. `python -m benchmarks.report` "
        "wrote this from the JSON files beside it."
    )
    parts += [f"![{name}]({name}.png)" for name in figures]
    for suite in dict.fromkeys(case.suite for case in cases):
        parts.append(f"## `pytest benchmarks/bench_{suite}.py`")
        parts += [case_table(case) for case in cases if case.suite == suite]
    return "\n\n".join(parts) + "\n"


def without_small_limits(case: Case) -> Case:
    """The case with the two of its limits that have the most work."""
    limits = sorted((row for row in case.rows if row.role == LIMIT), key=lambda row: row.work or 0.0)[-2:]
    return dataclasses.replace(case, rows=[row for row in case.rows if row.role != LIMIT or row in limits])


def readme_part(folder: Path, cases: Sequence[Case], figures: Sequence[str]) -> str:
    """What a README shows of a machine."""
    where = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    alternatives = {
        "bars": "Share of the machine's limit that each way reaches.",
        "scaling": "Rates and memory over vocabulary, tokens, batch and prompt length.",
        "roofline": "Operations per second over operations per byte.",
    }
    step = charts.find(cases, "step", "embedded")
    parts = [case_table(without_small_limits(step))] if step is not None else []
    pictures = [f"![{alternatives[name]}]({where}/{name}.png)" for name in alternatives if name in figures]
    return "\n\n".join([f"{measured_on(cases)} Everything: `{where}/report.md`.", summary(cases), *pictures, *parts])


def replaced(text: str, part: str) -> str:
    """The text with another part between the markers. Raises ValueError where they are not there, once, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"needs the lines {BEGIN!r} and {END!r}, once each and in this order")
    return f"{text[: text.index(BEGIN)]}{BEGIN}\n\n{part}\n\n{text[text.index(END) :]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="with a folder of results per machine")
    parser.add_argument("--readme", type=Path, help="Markdown file with the two markers")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    found, parts = machines(options.folder), []
    if not found:
        parser.error(f"{options.folder} holds no results; `make bench` measures and saves them")
    for folder, cases in found.items():
        figures = charts.draw(cases)
        for name, content in figures.items():
            (folder / f"{name}.png").write_bytes(content)
        (folder / "report.md").write_text(report(folder, cases, list(figures)), encoding="utf-8")
        parts.append(readme_part(folder.resolve(), cases, list(figures)))
        ours = sum(row.role == OURS and bool(row.seconds) for case in cases for row in case.rows)
        print(f"{folder}: {len(cases)} cases, {ours} rows of ours; report.md, {', '.join(f'{n}.png' for n in figures)}")
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        try:
            options.readme.write_text(replaced(text, "\n\n".join(parts)), encoding="utf-8")
        except ValueError as error:
            parser.error(f"--readme {options.readme}: {error}")


if __name__ == "__main__":
    main()
