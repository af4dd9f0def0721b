"""User code: call Python code of the user's with a time limit, and undo what it does to the process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

AGAIN = 1.0  # seconds between two signals to a call that catches the first
WAKE: Any = getattr(signal, "SIGVTALRM", None) if hasattr(signal, "pthread_kill") else None
"""Signal that ends a call, None on Windows. Not SIGALRM, which the called code may use for limits of its own."""


class TimeUp(BaseException):
    """Raised in a call whose time is up. It is no Exception, so `except Exception` in the called code lets it pass."""


Settings = tuple[bool, torch.dtype, torch.device]
"""torch's grad mode, default dtype and default device."""


def torch_settings() -> Settings:
    """Return the current settings."""
    return torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()


def set_torch(settings: Settings) -> None:
    """Change the current settings."""
    grad, dtype, device = settings
    torch.set_grad_enabled(grad)
    torch.set_default_dtype(dtype)
    if torch.get_default_device() != device:
        torch.set_default_device(None)  # as it is where nobody has set one
        if torch.get_default_device() != device:
            torch.set_default_device(device)


@contextmanager
def torch_settings_restored(within: Settings | None = None) -> Iterator[None]:
    """Restore torch's settings on leaving the context. within: settings in the context; None: the current ones."""
    before = torch_settings()
    try:
        if within is not None:
            set_torch(within)
        yield
    finally:
        set_torch(before)


def call_within(seconds: float, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function and return its result.

    In the main thread it is called there, since time limits by SIGALRM, sqlite3 connections and event loops belong to a
    thread. Elsewhere, and where a thread cannot be interrupted by a signal, it is called in a new thread, which goes on
    in the background after a timeout.

    seconds: time limit. Raises TimeUp if the call takes longer, and whatever the function raises.
    """
    limit = min(seconds, threading.TIMEOUT_MAX)
    here = WAKE is not None and threading.current_thread() is threading.main_thread()
    return (_call_here if here else _call_in_thread)(limit, lambda: function(*args, **kwargs))


def _call_here(limit: float, call: Callable[[], Any]) -> Any:
    """Call in this thread, the main one. A second thread interrupts it by a signal when the time is up."""
    armed, fired, done, main = True, False, threading.Event(), threading.get_ident()

    def on_signal(*_: object) -> None:
        nonlocal fired
        if armed:
            fired = True
            raise TimeUp

    def watch() -> None:
        pause = limit
        while not done.wait(pause):
            signal.pthread_kill(main, WAKE)
            pause = AGAIN

    previous = signal.signal(WAKE, on_signal)
    watcher = threading.Thread(target=watch, name="time limit", daemon=True)
    watcher.start()
    try:
        try:
            with _alarm_restored():
                result = call()
        finally:
            armed = False
    except Exception:
        if fired:  # the called code has turned it into an error of its own
            raise TimeUp from None
        raise
    finally:
        armed = False
        done.set()
        watcher.join()
        signal.signal(WAKE, previous or signal.SIG_DFL)
    if fired:  # the called code has caught it
        raise TimeUp
    return result


@contextmanager
def _alarm_restored() -> Iterator[None]:
    """Restore the handler of SIGALRM and its timer on leaving the context, where no alarm set within it may ring."""
    handler, (left, interval), start = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL), _now()
    try:
        yield
    finally:
        rest = max(left - (_now() - start), 0.0)
        same = signal.getsignal(signal.SIGALRM) is handler
        if not same or abs(signal.getitimer(signal.ITIMER_REAL)[0] - rest) > 0.05:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(rest, 1e-6), interval)


def _now() -> float:
    return time.monotonic()


def _call_in_thread(limit: float, call: Callable[[], Any]) -> Any:
    """Call in a new thread and wait for it."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.extend((call(), None))
        except BaseException as error:  # SystemExit would end the thread silently
            outcome.extend((None, error))

    # a daemon thread, so that a function that hangs does not keep the process alive
    thread = threading.Thread(target=work, name="scorer", daemon=True)
    thread.start()
    thread.join(limit)
    if not outcome:
        raise TimeUp
    result, error = outcome
    if error is not None:
        raise error
    return result
