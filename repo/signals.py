"""Signals: the first SIGINT or SIGTERM asks the loop to stop at its next safe point, a second one ends the process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """`requested` is set by the first signal, which also puts the previous handlers back."""

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested, self.announce = False, announce
        self.previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()
        self.announce("stopping at the next safe point, with a checkpoint; interrupt again to quit at once")

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
