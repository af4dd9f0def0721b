"""The sweep: a trial of each family in a process of its own, so that a crash or a hang is a row and not the end."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .tiny_config import FAMILIES
from .trial import Outcome, run

LIMIT = 120  # seconds of one family


def sweep(families: Sequence[str] = FAMILIES) -> Iterator[dict[str, Any]]:
    """Yield the Outcome of each family, as a dict."""
    for family in families:
        with tempfile.TemporaryDirectory() as folder:
            yield _apart(family, Path(folder))


def _apart(family: str, folder: Path) -> dict[str, Any]:
    """Run a trial in a forked process, which has everything imported already, for LIMIT seconds at most."""
    result = folder / "outcome.json"
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        for stream in (0, 1, 2):  # nothing asks a question, and what libraries print would break the table
            os.dup2(os.open(os.devnull, os.O_RDWR), stream)
        result.write_text(json.dumps(run(family, folder / "model")))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if result.exists():
        return json.loads(result.read_text())
    how = f"killed by {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else "left without a result"
    return vars(Outcome(family, "fails", how))
