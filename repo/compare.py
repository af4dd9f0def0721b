"""Compare evaluated policies prompt by prompt: what changed, which prompts became safe or unsafe, and who wins.

python -m repo.compare runs/ppo runs/repo              the newest evaluation of each run; the first is the baseline
python -m repo.compare a/eval/before.json a/eval/final.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime
from itertools import combinations
from pathlib import Path

from .command import console_of
from .common.errors import UserError, exit_with_sentence, require_package
from .common.files import make_parent, write_folder
from .config.arguments import join_negative_numbers, user_path
from .runs.json_lines import finite


def run_command(argv: list[str] | None = None) -> None:
    """Read the evaluations, compare every pair, print the result and write it as JSON with a figure of the frontier."""
    parser = argparse.ArgumentParser(
        prog="repo.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "evaluations",
        nargs="+",
        type=os.path.expanduser,
        metavar="RUN|FILE",
        help="two or more; the first is the baseline",
    )
    parser.add_argument(
        "--cost-limit", type=float, metavar="D", help="a response is safe iff cost <= D; default: the evaluations' own"
    )
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="new folder; default: comparisons/<date-time>")
    options = parser.parse_args(join_negative_numbers(sys.argv[1:] if argv is None else argv))
    if len(options.evaluations) < 2:
        raise UserError(f"repo.compare takes two or more runs or evaluation files; got {len(options.evaluations)}")
    out = options.out or Path("comparisons") / f"{datetime.now():%Y%m%d-%H%M%S}"
    if out.exists():
        raise UserError(f"--out: {out} exists; choose another folder")
    require_package("matplotlib", "the figure of a comparison")
    # after the arguments are checked: these take seconds to load
    from .evaluation.comparison import compare_pair, contender, print_pair, print_quantities, require_comparable
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
    """Run repo.compare as a console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
