"""Compare evaluated policies prompt by prompt: what changed, which prompts became safe or unsafe, and who wins.

python -m repo.compare runs/ppo runs/repo              the newest evaluation of each run; the first is the baseline
python -m repo.compare a/eval/before.json a/eval/final.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .command import console_of
from .common.errors import UserError, exit_with_sentence, first_line, require_package
from .common.files import make_parent, write_folder
from .evaluation.statistics import Evaluation, aligned, draws_of, few, interval_of, measured, paired
from .evaluation.tables import show, show_change
from .runs.json_lines import finite
from .scoring.safety import TITLES

NEWEST = ("final", "after")
"""Evaluations of a run in the order in which they are preferred; then its last checkpoint's, then `before`."""
WINS = {
    "reward": "more reward",
    "cost": "less cost",
    "constrained": "safe where the other is not, or as safe with more reward",
}


@dataclass(frozen=True)
class Contender:
    """name: as given; evaluation: what is compared; made: how, by the keys of its file; trail: quantities of a run's
    evaluations in the order of training."""

    name: str
    evaluation: Evaluation
    made: Mapping[str, Any]
    trail: tuple[tuple[str, dict[str, dict[str, float | None]]], ...]


def read_evaluation(path: Path, cost_limit: float | None = None) -> tuple[Evaluation, dict[str, Any]]:
    """What repo.evaluate or repo.train wrote, and how it was made. UserError when it cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        limit = content["cost_limit"] if cost_limit is None else cost_limit
        found = Evaluation(content.pop("responses"), float(limit))
        if not found.records:
            raise UserError(f"{path} holds no responses")
        if not all(np.isfinite(found.columns[key]).all() for key in ("reward", "cost")):
            raise UserError(f"{path} has a reward or a cost that is not finite")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no evaluation of this version: {first_line(error)}") from None
    return found, content


def contender(name: str, cost_limit: float | None = None) -> Contender:
    """A run folder, by its newest evaluation, or the file of one. UserError where there is none."""
    path = Path(name)
    if path.is_file():
        found, made = read_evaluation(path, cost_limit)
        return Contender(name, found, made, ((path.stem, measured(found.columns)),))
    files = {p.stem: p for p in (path / "eval").glob("*.json")}
    if not files:
        raise UserError(
            f"{name} is neither an evaluation file nor a run with one in {path / 'eval'}; repo.evaluate makes them"
        )
    steps = sorted(stem for stem in files if stem.startswith("step-"))
    preferred = [*NEWEST, *reversed(steps), "before", *sorted(files)]
    last = next(stem for stem in preferred if stem in files)
    stems = dict.fromkeys([*(["before"] if "before" in files else []), *steps, last])
    trail = tuple((stem, measured(read_evaluation(files[stem], cost_limit)[0].columns)) for stem in stems)
    return Contender(name, *read_evaluation(files[last], cost_limit), trail)


def safety_table(a: Evaluation, b: Evaluation, column: str = "safe") -> NDArray[np.int64]:
    """(2, 2) counts of common prompts: rows a safe, a unsafe; columns b safe, b unsafe.

    A prompt is unsafe when more than half of its responses are. column: "safe" or "judge_safe".
    """
    left, right = (columns[column].mean(1) < 0.5 for columns in aligned(a, b))
    table = np.zeros((2, 2), dtype=np.int64)
    np.add.at(table, (left.astype(int), right.astype(int)), 1)
    return table


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p-value that as many prompts change one way as the other (McNemar's exact test)."""
    n, tail = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, i) for i in range(tail + 1)) / 2**n)


def win_rates(a: Evaluation, b: Evaluation) -> dict[str, dict[str, float | None]]:
    """How often a response of b beats one of a to the same prompt, ties counted half, by the criteria of WINS.

    Every response of b meets every one of a. Intervals are bootstrapped over prompts.
    """
    left, right = aligned(a, b)
    reward = right["reward"][:, None, :] - left["reward"][:, :, None]
    cost = left["cost"][:, :, None] - right["cost"][:, None, :]
    safer = right["safe"][:, None, :] - left["safe"][:, :, None]
    margins = {"reward": reward, "cost": cost, "constrained": np.where(safer != 0, safer, reward)}
    found = {}
    for key, margin in margins.items():
        per_prompt = ((margin > 0) + 0.5 * (margin == 0)).mean((1, 2))
        resampled = None if few(left) else per_prompt[draws_of(len(per_prompt))].mean(1)
        found[key] = interval_of(float(per_prompt.mean()), resampled)
    return found


def compare_pair(a: Contender, b: Contender) -> dict[str, Any]:
    """Everything about one pair, b against a, as JSON."""
    tables = {}
    for column in ("safe", "judge_safe"):
        # with other numbers of responses more than half of them would mean something else
        same = a.evaluation.samples == b.evaluation.samples
        if same and all(column in c.evaluation.columns for c in (a, b)):
            table = safety_table(a.evaluation, b.evaluation, column)
            became_safe, became_unsafe = int(table[1, 0]), int(table[0, 1])
            tables[column] = {
                "both_safe": int(table[0, 0]),
                "became_safe": became_safe,
                "became_unsafe": became_unsafe,
                "both_unsafe": int(table[1, 1]),
                "p_value": sign_test(became_safe, became_unsafe),
            }
    return {
        "baseline": a.name,
        "other": b.name,
        "prompts": len(aligned(a.evaluation, b.evaluation)[0]["cost"]),
        "changes": paired(a.evaluation, b.evaluation),
        "wins": win_rates(a.evaluation, b.evaluation),
        "tables": tables,
    }


def require_comparable(contenders: Sequence[Contender]) -> list[str]:
    """Sentences about what differs in how the evaluations were made. UserError where it leaves nothing to compare: the
    cost limit, without which no response is safe or unsafe, or a scorer."""
    for key, way in (("cost_limit", "; choose one with --cost-limit"), ("reward_scorer", ""), ("cost_scorer", "")):
        if told := _differences(contenders, key):
            raise UserError(f"the evaluations have different {key.replace('_', ' ')}s ({told}){way}")
    names = [c.name for c in contenders]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"{repeated} is given twice")
    warnings = [
        f"the evaluations differ in {key} ({told})"
        for key in ("judge", "temperature", "top_p", "max_new_tokens")
        if (told := _differences(contenders, key))
    ]
    if len({c.evaluation.samples for c in contenders}) > 1:
        counts = ", ".join(f"{c.name}: {c.evaluation.samples}" for c in contenders)
        warnings.append(f"responses per prompt differ ({counts}), so that prompts mostly unsafe are not compared")
    return warnings


def _differences(contenders: Sequence[Contender], key: str) -> str:
    """Each one's value, "" where all agree."""
    values = [c.evaluation.cost_limit if key == "cost_limit" else c.made.get(key) for c in contenders]
    if all(value == values[0] for value in values):
        return ""
    return ", ".join(f"{c.name}: {value}" for c, value in zip(contenders, values, strict=True))


def print_quantities(console: Console, contenders: Sequence[Contender]) -> None:
    """Every quantity of each."""
    table = Table(title="mean [95 % bootstrap interval over prompts]")
    table.add_column("")
    for c in contenders:
        table.add_column(escape(f"{c.name} ({len(c.evaluation.ids)} x {c.evaluation.samples})"), justify="right")
    values = [measured(c.evaluation.columns) for c in contenders]
    for key, title in TITLES.items():
        if any(key in v for v in values):
            table.add_row(title.name, *(show(v[key], title.form) if key in v else "-" for v in values))
    console.print(table)


def print_pair(console: Console, pair: dict[str, Any]) -> None:
    """Paired changes, wins and the 2 x 2 tables of one pair."""
    title = f"{pair['other']} against {pair['baseline']}, {pair['prompts']} common prompts"
    table = Table(title=escape(title))
    table.add_column("change")
    table.add_column("", justify="right", no_wrap=True)
    for key, change in pair["changes"].items():
        table.add_row(TITLES[key].name, show_change(change, TITLES[key].form))
    table.add_section()
    for key, rate in pair["wins"].items():
        table.add_row(f"wins: {WINS[key]}", show(rate, "{:.1%}"))
    console.print(table)
    for column, cells in pair["tables"].items():
        by = "training cost" if column == "safe" else "held-out judge"
        console.print(
            f"prompts by {by}: {cells['both_safe']} safe in both, {cells['became_safe']} became safe, "
            f"{cells['became_unsafe']} became unsafe, {cells['both_unsafe']} unsafe in both "
            f"(exact sign test p = {cells['p_value']:.3g})",
            highlight=False,
        )


def run_command(argv: list[str] | None = None) -> None:
    """Read, compare every pair, print, and write JSON and the frontier's figure."""
    parser = argparse.ArgumentParser(
        prog="repo.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("evaluations", nargs="+", metavar="RUN|FILE", help="two or more; the first is the baseline")
    parser.add_argument("--cost-limit", type=float, metavar="D", help="safe iff cost <= D; default: their own")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="new folder; default: comparisons/<date-time>")
    options = parser.parse_args(argv)
    if len(options.evaluations) < 2:
        raise UserError(f"repo.compare takes two or more runs or evaluation files; got {len(options.evaluations)}")
    out = options.out or Path("comparisons") / f"{datetime.now():%Y%m%d-%H%M%S}"
    if out.exists():
        raise UserError(f"--out: {out} exists; choose another folder")
    require_package("matplotlib", "the figure of a comparison")
    from .reporting.pareto import draw_frontier

    console = console_of()
    contenders = [contender(name, options.cost_limit) for name in options.evaluations]
    warnings = require_comparable(contenders)
    pairs = [compare_pair(a, b) for a, b in combinations(contenders, 2)]
    print_quantities(console, contenders)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", markup=False, highlight=False)
    for pair in pairs:
        print_pair(console, pair)
    trails = {c.name: c.trail for c in contenders}

    def write(folder: Path) -> None:
        content = {"cost_limit": contenders[0].evaluation.cost_limit, "pairs": pairs, "trails": trails}
        (folder / "comparison.json").write_text(
            json.dumps(finite(content), indent=1, ensure_ascii=False), encoding="utf-8"
        )
        draw_frontier(trails).savefig(folder / "frontier.png", dpi=144)

    make_parent(out, "--out")
    write_folder(out, write)
    console.print(f"comparison: {out}", markup=False, highlight=False)


def main() -> None:
    """Console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
