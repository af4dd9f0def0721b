"""Interrupts: the first SIGINT or SIGTERM stops the loop at its next safe point, a second one ends the process."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Raised to end an interrupted run, after a checkpoint or where a resumed run repeats the work."""


class StopRequest:
    """Handler of SIGINT and SIGTERM. The first signal sets `requested` and restores the previous handlers.

    Leaving the context restores them too.

    announce: prints a sentence.
    of_several: the process is one of several under torchrun, which answers an interrupt from the terminal with a
        SIGTERM to its processes. Only the handler of the signal that came is restored then, so that only a repetition
        of the same signal ends the process.
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
        """Raise Stopped at once for a signal within this context, whose work a resumed run does again.

        Raises Stopped on entry if a signal has already come.
        """
        if self.requested:
            raise Stopped
        self._nothing_to_save = True
        try:
            yield
        finally:
            self._nothing_to_save = False

    def leave(self) -> None:
        """Raise Stopped; call it after everything is saved."""
        raise Stopped

    def restore(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
