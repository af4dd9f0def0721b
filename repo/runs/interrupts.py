"""Signals: the first SIGINT or SIGTERM asks the loop to stop at its next safe point, a second one ends the process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Raised by a signal where nothing has to be saved."""


class StopRequest:
    """`requested` is set by the first signal, which also puts the previous handlers back, as leaving the context does.

    of_several: under torchrun, which passes an interrupt of the terminal on as a SIGTERM: only the same signal again
    ends the process.
    """

    def __init__(self, announce: Callable[[str], None], of_several: bool = False) -> None:
        self.requested, self.announce, self.of_several, self._nothing_to_save = False, announce, of_several, False
        self.previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if self.of_several:
            signal.signal(number, self.previous[signal.Signals(number)])
        else:
            self.restore()
        if self._nothing_to_save:
            raise Stopped
        if not again:
            limit = ", unless torchrun ends it sooner (--shutdown-timeout, 30 s)" if self.of_several else ""
            self.announce(f"stopping at the next safe point, with a checkpoint{limit}; interrupt again to quit at once")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a signal raises Stopped: what is done there is done again on resuming."""
        if self.requested:
            raise Stopped
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def leave(self) -> None:
        """Raise Stopped, once everything is saved."""
        raise Stopped

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
