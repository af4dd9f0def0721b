"""Try every family and write the table.

python -m benchmarks.families                             all of them, printed one by one
python -m benchmarks.families mamba qwen3_next            these
python -m benchmarks.families --docs docs/models.md       all, and the table written into the page
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from .sweep import sweep
from .table import faults, write_table
from .tiny_config import FAMILIES


def main() -> int:
    """Run the sweep and print each outcome; returns 1 if a family ends in an error or gives other results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=FAMILIES, help="model types of transformers; default: all")
    parser.add_argument("--docs", type=Path, help="page whose table is replaced; takes all families")
    options = parser.parse_args()
    if options.docs and options.families is not FAMILIES:
        parser.error("--docs takes all families; leave their names out")
    outcomes = []
    for outcome in sweep(options.families):
        outcomes.append(outcome)
        print(
            f"{time.strftime('%H:%M:%S')} {outcome['family']:25}{outcome['result']:10}{outcome['layout']:16}"
            f"{outcome['decoding']:34}{outcome['difference']:8.0e}  {outcome['why'][:200]}",
            flush=True,
        )
    if options.docs:
        write_table(outcomes, options.docs)
    wrong = faults(outcomes)
    trained = sum(outcome["result"] == "trains" for outcome in outcomes)
    print(f"{trained} of {len(outcomes)} train; at fault: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
