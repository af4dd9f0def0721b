"""Build the embedded default's policy, scorers, judge and prompts from installed packages.

python -m repo.assets [--dir DIR] [--force]
python -m repo.assets --fit        refit the committed heads first (many minutes; needs scikit-learn)
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import AssetError, assets_dir, build


def main(argv: list[str] | None = None) -> int:
    """Parse arguments, fit if asked to, build and print the folder; return the exit code, 1 for an AssetError."""
    parser = argparse.ArgumentParser(
        prog="python -m repo.assets",
        description="Build the embedded default's policy, scorers, judge and prompts from installed packages.",
    )
    parser.add_argument("--dir", type=Path, help="folder (default: $REPO_ASSETS, else ~/.cache/repo-assets)")
    parser.add_argument("--force", action="store_true", help="build even if the folder is current")
    parser.add_argument("--fit", action="store_true", help="refit the committed scorer and judge heads first")
    args = parser.parse_args(argv)
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console) as progress:
            if args.fit:
                from .fit import fit

                fit(assets_dir(args.dir), Bar(progress))
            built = build(args.dir, args.force, Bar(progress))
    except AssetError as error:
        console.print(f"[red]error:[/red] {error}", soft_wrap=True, highlight=False)
        return 1
    print(f"{assets_dir(args.dir)} {'built' if built else 'is current'}")
    return 0


class Bar:
    """Report that shows each stage of the build on a rich progress display."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.task = progress.add_task("", total=None)

    def __call__(self, name: str, done: int, total: int) -> None:
        """Show that `done` of `total` parts of the stage `name` are done."""
        self.progress.update(self.task, description=name, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
