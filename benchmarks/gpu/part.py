"""Run one part of `python -m benchmarks.gpu` in this process.

python -m benchmarks.gpu.part losses --out FOLDER --cache FOLDER --until MOMENT
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.gpu import agreement, call, forms, linear, losses, measuring
from benchmarks.gpu.loop import measuring as loop
from benchmarks.gpu.plan import PLANS
from benchmarks.gpu.rehearsal import rehearse
from benchmarks.harness.process import Deadline

SUITES = {"losses": losses, "call": call, "linear": linear, "forms": forms}


def main() -> None:
    """Run the part and write its results below the folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.part", description=__doc__)
    parser.add_argument("part", choices=["agreement", loop.NAME, *SUITES])
    parser.add_argument("--out", type=Path, required=True, help="folder of the part's JSON")
    parser.add_argument("--cache", type=Path, required=True, help="folder of what parts tell each other")
    parser.add_argument("--until", type=float, required=True, help="when to stop measuring, on time.monotonic()")
    parser.add_argument("--plan", choices=PLANS, default="real")
    options = parser.parse_args()
    plan, deadline = PLANS[options.plan], Deadline(options.until)
    file = options.cache / "agreement.jsonl"
    rehearse(plan, options.part)
    if options.part in SUITES:
        measuring.measure(SUITES[options.part], plan, options.out, deadline, agreement.read(file))
    elif options.part == loop.NAME:
        loop.measure(plan, options.out, deadline)
    else:
        agreement.check(list(SUITES.values()), plan, file, deadline)


if __name__ == "__main__":
    main()
