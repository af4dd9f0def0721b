"""Write reports and figures from committed results.

    python -m benchmarks.report                               # every machine in benchmarks/results
    python -m benchmarks.report --docs docs/benchmarks.md     # and the parts of that page between its markers

Writes report.md, bars.png, roofline.png and scaling.png beside the JSON files of each machine: those of `make bench`,
and the gpu.json of `make gpu`. Measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.machine import told
from benchmarks.harness.results import FOLDER, LIMIT, OURS, PEER, Case, holds_cases, ratio, read
from benchmarks.reporting import charts, gpu_tables
from benchmarks.reporting.tables import case_table, milliseconds

BEGIN, END = "<!-- benchmarks: written by python -m benchmarks.report --docs -->", "<!-- end of benchmarks -->"
GPU_BEGIN, GPU_END = BEGIN.replace("benchmarks:", "make gpu:"), "<!-- end of make gpu -->"
SUITES = (
    "loss", "logprobs", "linear", "memory", "step", "train_vs_trl", "checkpoint", "scaling",
    "gpu_tests", "gpu_losses", "gpu_call", "gpu_linear", "gpu_forms",
)  # fmt: skip
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
    ("logprobs", "hidden states, values", "log-probabilities from hidden states"),
    ("logprobs", "hidden states, with gradients", "the same with gradients"),
    ("step", "embedded", "update of the default run"),
    ("train_vs_trl", "embedded", "a training step beside TRL's GRPOTrainer"),
)


def machines(folder: Path) -> dict[Path, list[Case]]:
    """Return the cases of every folder that holds results, in the order of SUITES.

    Raises:
        ValueError: as results.read, or if a case is from a rehearsal, whose numbers mean nothing.
    """
    cases_of = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if not holds_cases(path):
            continue
        cases = read(path)
        if any("rehearsal" in case.provenance for case in cases):
            raise ValueError(f"{path} holds a rehearsal")
        cases_of[path] = sorted(cases, key=lambda c: SUITES.index(c.suite) if c.suite in SUITES else len(SUITES))
    return cases_of


def headline(case: Case, title: str) -> str:
    """Return one row: our time, share of the limit, every peer's time over ours, error and extra peak memory."""
    row = case.row(case.subject)
    assert row is not None
    share = f"{row.rate / case.peak_rate:.0%}" if row.rate and case.peak_rate else ""
    peers = []
    for other in case.rows:
        same = other.role == PEER and other.work == row.work
        times = ratio(case, other.way) if same else None
        if times is not None:
            peers.append(f"{other.way} {times.median:.2f}")
    error = f"{row.error:.0e}" if row.error is not None else ""
    peak = f"{row.extra_peak / 1e6:.0f}" if row.extra_peak is not None else ""
    return f"| {title} | {milliseconds(row)} | {share} | {'; '.join(peers)} | {error} | {peak} |"


def summary(cases: Sequence[Case]) -> str:
    """Return the table of HEADLINES."""
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
    """Say on which machine, when and at which commits the cases were measured."""
    loads = sorted({case.provenance["load"] for case in cases})
    commits = sorted({case.provenance["commit"] for case in cases})
    first = told(cases[0].provenance).split(", load")[0]
    packages = told(cases[0].provenance).split("; ")[1]
    dates = sorted(case.provenance["date"][:10] for case in cases)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    load = f"load before a run {', '.join(f'{value:g}' for value in loads)}"
    return f"{first}, {load}; {packages}; {when}, commits {', '.join(commits)}."


def report(cases: Sequence[Case], figures: Sequence[str]) -> str:
    """Return the whole report of a machine."""
    parts = [f"# Benchmarks: {cases[0].provenance['processor']}", measured_on(cases)]
    parts.append(
        "Ways of a case take turns in one process (trainings: in processes of their own); times are medians with "
        "quartiles, ratios are formed within a round. What has an error was compared with fp64 on a small problem "
        "before it was timed. The limit is the best copy or matrix product of the same case. Freed memory is kept "
        "while a case is timed, unless the case is named after the default allocator. `python -m benchmarks.report` "
        "wrote this from the JSON files beside it."
    )
    parts += [f"![{name}]({name}.png)" for name in figures]
    for suite in dict.fromkeys(case.suite for case in cases if not case.suite.startswith(gpu_tables.PREFIX)):
        parts.append(f"## `pytest benchmarks/bench_{suite}.py`")
        parts += [case_table(case) for case in cases if case.suite == suite]
    parts += gpu_tables.sections(cases)
    return "\n\n".join(parts) + "\n"


def without_small_limits(case: Case) -> Case:
    """Return the case with only the two of its limits that have the most work."""
    limits = sorted((row for row in case.rows if row.role == LIMIT), key=lambda row: row.work or 0.0)[-2:]
    return dataclasses.replace(case, rows=[row for row in case.rows if row.role != LIMIT or row in limits])


def gpu_part(folder: Path, cases: Sequence[Case], page: Path) -> str:
    """Return what the documentation shows of `make gpu` on a machine, whose tests and forms are left to its report."""
    where = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    shown = [case for case in cases if case.suite in ("gpu_losses", "gpu_call", "gpu_linear")]
    sections = [part.replace("## ", "### ") if part.startswith("## ") else part for part in gpu_tables.sections(shown)]
    return "\n\n".join([f"{measured_on(cases)} Everything: [report.md]({where}/report.md).", *sections])


def written(text: str, cases_of: dict[Path, list[Case]], page: Path) -> str:
    """Return the text of the documentation's page with what the results of all machines say.

    Raises:
        ValueError: as `replaced`.
    """
    parts, gpu_parts = [], []
    for folder, cases in cases_of.items():
        gpu = [case for case in cases if case.suite.startswith(gpu_tables.PREFIX)]
        others = [case for case in cases if case not in gpu]
        if others:
            parts.append(docs_part(folder, others, list(charts.draw(others)), page))
        if gpu:
            gpu_parts.append(gpu_part(folder, gpu, page))
    text = replaced(text, "\n\n".join(parts), BEGIN, END) if parts else text
    return replaced(text, "\n\n".join(gpu_parts), GPU_BEGIN, GPU_END) if gpu_parts else text


def docs_part(folder: Path, cases: Sequence[Case], figures: Sequence[str], page: Path) -> str:
    """Return what the documentation shows of a machine; its links are relative to the page."""
    where = Path(os.path.relpath(folder.resolve(), page.resolve().parent)).as_posix()
    alternatives = {
        "bars": "Share of the machine's limit that each way reaches.",
        "scaling": "Rates and memory over vocabulary, tokens, batch and prompt length.",
        "roofline": "Operations per second over operations per byte.",
    }
    step = charts.find(cases, "step", "embedded")
    parts = [case_table(without_small_limits(step))] if step is not None else []
    pictures = [f"![{alternatives[name]}]({where}/{name}.png)" for name in alternatives if name in figures]
    return "\n\n".join(
        [f"{measured_on(cases)} Every case: [report.md]({where}/report.md).", summary(cases), *pictures, *parts]
    )


def replaced(text: str, part: str, begin: str = BEGIN, end: str = END) -> str:
    """Return the text with another part between the markers.

    Raises:
        ValueError: if the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"needs the lines {begin!r} and {end!r}, once each and in this order")
    return f"{text[: text.index(begin)]}{begin}\n\n{part}\n\n{text[text.index(end) :]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the reports and figures, and the part of the page."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=FOLDER,
        help="folder that holds a folder of results for each machine (default: benchmarks/results)",
    )
    parser.add_argument(
        "--docs", type=Path, metavar="PAGE.md", help="Markdown page with the two markers, to update too"
    )
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is not a folder")
    try:
        cases_of = machines(options.folder)
    except ValueError as problem:
        parser.error(str(problem))
    if not cases_of:
        parser.error(f"{options.folder} holds no results; `make bench` measures and saves them")
    for folder, cases in cases_of.items():
        figures = charts.draw(cases)
        for name, content in figures.items():
            (folder / f"{name}.png").write_bytes(content)
        (folder / "report.md").write_text(report(cases, list(figures)), encoding="utf-8")
        ours = sum(row.role == OURS and bool(row.seconds) for case in cases for row in case.rows)
        print(f"{folder}: {len(cases)} cases, {ours} rows of ours; report.md, {', '.join(f'{n}.png' for n in figures)}")
    if options.docs:
        try:
            text = options.docs.read_text(encoding="utf-8")
            options.docs.write_text(written(text, cases_of, options.docs), encoding="utf-8")
        except (OSError, ValueError) as error:
            parser.error(f"--docs {options.docs}: {error}")


if __name__ == "__main__":
    main()
