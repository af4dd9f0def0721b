"""After a run: draw its report, without losing the run where that fails."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..common.errors import UserError, first_line


def draw_report(run: Path, console: Console) -> bool:
    """Draw the report of a finished run and print its path, or why there is none: the run itself is saved already.

    run: the run folder. Returns whether the report was drawn.
    """
    from .document import write_report  # here, since it takes a while to load

    try:
        index = write_report(run)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        console.print(f"no report was drawn: {reason}", style="yellow", markup=False, highlight=False)
        return False
    console.print(f"report: {index}", markup=False, highlight=False)
    return True
