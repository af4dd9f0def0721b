"""A process with a time limit, which takes what it started with it when it is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from benchmarks.harness.machine import ROOT

GRACE = 3.0  # seconds between the limit that a part knows and the one at which it is killed


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock, which all processes of a machine share."""

    moment: float

    @classmethod
    def in_seconds(cls, seconds: float) -> Deadline:
        """Return the moment so many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Return the seconds until the moment, negative after it."""
        return self.moment - time.monotonic()

    @property
    def passed(self) -> bool:
        """Return whether the moment is over."""
        return self.left <= 0


class Process:
    """A module of this repository, run by this Python in a process group of its own, with its output in a file."""

    def __init__(self, module: str, arguments: Sequence[str], limit: float, log: Path, more: Mapping[str, str]) -> None:
        self.limit, self.deadline = limit, Deadline.in_seconds(limit)
        self.log, self.started = log, time.monotonic()
        self._output: IO[bytes] = log.open("ab")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **more},
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip

    def wait(self) -> str | None:
        """Wait for the end or the limit, and stop what still runs. Return why the process failed, or None."""
        try:
            status = self._process.wait(max(self.deadline.left, 0))
            reason = f"exit status {status}: {self.last_line()}" if status else None
        except subprocess.TimeoutExpired:
            reason = f"stopped at its limit of {self.limit:.0f} s"
        self.stop()
        return reason

    def stop(self) -> None:
        """Kill the process and everything that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()

    @property
    def seconds(self) -> float:
        """Return how long the process has run, or ran if `wait` was called just now."""
        return time.monotonic() - self.started

    def last_line(self) -> str:
        """Return the last line of the output that says something."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:200] if lines else "no output"
