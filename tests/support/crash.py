"""Simulate a power cut at a chosen system call, within this process: later calls fail, unsynced content is lost."""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


class Died(BaseException):
    """Raised by the simulated power cut; a BaseException, which the code under test does not catch."""


class Machine:
    """Counts the calls that change files, and simulates the power cut at one of them.

    folder: its files are the ones that lose content. at: 2k cuts the power before call k, 2k + 1 after it; None never.
    """

    def __init__(self, folder: Path, at: int | None) -> None:
        self.folder, self.at, self.dead = folder, at, False
        self.calls: list[str] = []
        self.unsynced: set[int] = set()  # inodes

    def _inode(self, target) -> int | None:
        try:
            return (os.fstat(target) if isinstance(target, int) else os.stat(target)).st_ino
        except OSError:
            return None

    def call(self, name: str, function, *arguments, **options):
        """Make a system call, unless the power is cut before it; cut the power after it if `at` says so."""
        if self.dead:
            raise Died
        number = len(self.calls)
        self.calls += [f"before {name}", f"after {name}"]
        if self.at == number:
            self.die()
        result = function(*arguments, **options)
        if name == "fsync":
            self.unsynced.discard(self._inode(arguments[0]))
        elif name in ("write", "write_text"):
            self.unsynced.add(self._inode(arguments[0]))
        if self.at == number + 1:
            self.die()
        return result

    def die(self) -> None:
        """Cut the power: files whose content was not synced lose half of it. Raises Died."""
        self.dead = True
        for path in self.folder.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                _truncate(path, path.stat().st_size // 2)
        raise Died


_truncate = os.truncate
CALLS = ("write", "fsync", "rename", "replace", "ftruncate", "mkdir", "rmdir", "unlink")


@contextmanager
def machine(folder: Path, at: int | None = None):
    """Send the file calls of this process through a Machine, which is yielded."""
    counting = Machine(folder, at)
    write_text = Path.write_text

    def through(name, function):
        return lambda *a, **k: counting.call(name, function, *a, **k)

    patches = [mock.patch.object(os, name, through(name, getattr(os, name))) for name in CALLS]
    patches.append(mock.patch.object(Path, "write_text", through("write_text", write_text)))
    for patch in patches:
        patch.start()
    try:
        yield counting
    finally:
        for patch in reversed(patches):
            patch.stop()
