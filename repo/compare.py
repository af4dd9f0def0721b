"""Compare evaluated policies prompt by prompt: what changed, which prompts became safe or unsafe, and who wins.

python -m repo.compare runs/ppo runs/repo              the newest evaluation of each run; the first is the baseline
python -m repo.compare a/eval/before.json a/eval/final.json
python -m repo.compare --scales 0.25,0.5,0.75,1,1.25 runs/repo
                                        one run at several scales of its update, reference + scale * (policy -
                                        reference): evaluates them on its held-out prompts, draws reward against safe
                                        rate, and keeps the evaluations in RUN/scales for the next call
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .command import console_of
from .common.errors import UserError, exit_with_sentence, require_package
from .common.files import make_parent, write_bytes, write_folder, write_text
from .config.arguments import join_negative_numbers, user_path
from .config.parse import load_config, require_run
from .evaluate import held_out_config
from .runs.json_lines import finite

if TYPE_CHECKING:  # it takes seconds to load
    from .evaluation.scales import ScaledEvaluations


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
        help="two or more; the first is the baseline. With --scales: one run",
    )
    parser.add_argument(
        "--cost-limit", type=float, metavar="D", help="a response is safe iff cost <= D; default: the evaluations' own"
    )
    parser.add_argument(
        "--out",
        type=user_path,
        metavar="FOLDER",
        help="new folder; default: comparisons/<date-time>. With --scales: the folder of the kept evaluations; "
        "default: RUN/scales",
    )
    parser.add_argument("--scales", metavar="A,B", help="scales of the update of one run, each > 0 and <= 1.5")
    parser.add_argument("--checkpoint", metavar="NAME", help="with --scales: latest (default), best or step-000010")
    parser.add_argument("--trust-remote-code", action="store_true", help="with --scales: run Python code of the model")
    options = parser.parse_args(join_negative_numbers(sys.argv[1:] if argv is None else argv))
    if options.scales is not None:
        compare_scales(options)
        return
    for given, name in ((options.checkpoint, "--checkpoint"), (options.trust_remote_code, "--trust-remote-code")):
        if given:
            raise UserError(f"{name} needs --scales: evaluations that are there name their checkpoints themselves")
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


def compare_scales(options: argparse.Namespace) -> None:
    """Evaluate what is missing of one run's scaled policies, and print, draw and write what they reach."""
    if len(options.evaluations) != 1:
        raise UserError(f"--scales takes one run; got {len(options.evaluations)}")
    run = Path(options.evaluations[0])
    require_run(run, "RUN")
    require_package("matplotlib", "the figure of a comparison")
    # after the arguments are checked: these take seconds to load
    from .evaluation.comparison import print_quantities
    from .evaluation.scales import ScaledEvaluations, parse_scales, points_of
    from .reporting.pareto import draw_scales
    from .reporting.style import png
    from .runs.checkpoint import find_named

    scales, config = parse_scales(options.scales), held_out_config(load_config(run / "config.yaml"))
    source = find_named(run, options.checkpoint or "latest")
    kept = ScaledEvaluations(run, source, config, options.out or run / "scales")
    console = console_of()
    missing = [scale for scale in scales if not kept.is_known(scale)]
    if missing:
        evaluate_scales(kept, missing, options.trust_remote_code, console)
    contenders = kept.read(scales, options.cost_limit)
    print_quantities(console, contenders)
    points, limit = points_of(contenders), contenders[0].evaluation.cost_limit
    content = {"run": str(run), "checkpoint": source.name, "cost_limit": limit, "points": points}
    write_text(kept.folder / "scales.json", json.dumps(finite(content), indent=1, ensure_ascii=False))
    write_bytes(kept.folder / "scales.png", png(draw_scales([(p["scale"], p["quantities"]) for p in points])))
    console.print(f"scales: {kept.folder}", markup=False, highlight=False)


def evaluate_scales(kept: ScaledEvaluations, scales: Sequence[float], trust: bool, console: Console) -> None:
    """Evaluate a run's policy at each scale and keep the evaluations. trust: run Python code of models."""
    from transformers.utils import logging as transformers_logging

    from .evaluate import load_shared
    from .evaluation.scales import name_of
    from .setup import load_checkpoint_policy

    transformers_logging.disable_progress_bar()
    shared = load_shared(kept.config, kept.config.model.path, trust, console)
    for scale in scales:
        policy = load_checkpoint_policy(kept.source, kept.config, shared.device, trust, scale)
        policy, prompts = shared.prepare(policy, kept.source.name)
        if scale == scales[0]:
            shared.rehearse(prompts)
        kept.write(scale, shared.evaluate(policy, prompts, f"{kept.source.name}, scale {name_of(scale)}"))
        del policy  # before the next one is loaded


def main() -> None:
    """Run repo.compare as a console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
