"""Write a run's report: one HTML file that needs nothing else, and every figure as a PNG beside it.

python -m repo.report runs/mine                     writes runs/mine/report, also while the run is still training
python -m repo.report runs/mine --out elsewhere
"""

from __future__ import annotations

import argparse

from .common.errors import exit_with_sentence
from .config.arguments import user_path
from .config.parse import require_run


def run_command(argv: list[str] | None = None) -> None:
    """Parse the command line, write the report and print its path."""
    parser = argparse.ArgumentParser(
        prog="repo.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=user_path, help="run folder")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help="folder to write to; default: RUN/report")
    options = parser.parse_args(argv)
    require_run(options.run, "RUN")
    from .reporting.document import write_report  # after the arguments are checked: it takes seconds to load

    print(f"report: {write_report(options.run, options.out)}")


def main() -> None:
    """Run repo.report as a console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
