"""A process that dies at a chosen system call, within this one: every later call fails too, and what was not synced is
lost, as when the power goes."""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


class Died(BaseException):
    """What the code under test cannot catch."""


class Machine:
    """Counts the calls that change files and dies at number `at`: 2k is before the k-th call, 2k + 1 after it. With
    at=None it lives."""

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
        """One system call: (dies before) happens (dies after)."""
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
        """Files whose content was never synced lose half of it."""
        self.dead = True
        for path in self.folder.rglob("*"):
            if path.is_file() and path.stat().st_ino in self.unsynced:
                _truncate(path, path.stat().st_size // 2)
        raise Died


_truncate = os.truncate
CALLS = ("write", "fsync", "rename", "replace", "ftruncate", "mkdir", "rmdir", "unlink")


@contextmanager
def machine(folder: Path, at: int | None = None):
    """Within it the calls of this process go through a Machine, which is yielded."""
    found = Machine(folder, at)
    write_text = Path.write_text

    def through(name, function):
        return lambda *a, **k: found.call(name, function, *a, **k)

    patches = [mock.patch.object(os, name, through(name, getattr(os, name))) for name in CALLS]
    patches.append(mock.patch.object(Path, "write_text", through("write_text", write_text)))
    for patch in patches:
        patch.start()
    try:
        yield found
    finally:
        for patch in reversed(patches):
            patch.stop()
