"""JSON lines: the append-only files of a run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from ..common.errors import UserError


class JsonLines:
    """An append-only file of JSON objects, one per line."""

    def __init__(self, path: Path, offset: int | None = None) -> None:
        """Open the file for appending. offset: bytes to cut an existing file back to first; None keeps all of it."""
        self.path = path
        if offset is not None:
            with path.open("r+b") as file:
                file.truncate(offset)
        self.file = path.open("a", encoding="utf-8")
        lock(self.file)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinities become null. Raises UserError if it cannot be written."""
        try:
            self.file.write(json.dumps(finite(dict(record)), ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; the last checkpoint is intact") from error

    def sync(self) -> int:
        """Force the file to disk and return its size in bytes, which a checkpoint stores."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed; returns False if another process has it or the system cannot lock it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # no such module on Windows; some network file systems have no locks
        return False
    return True


def finite(value: Any) -> Any:
    """Replace NaN and infinities by None, at any depth: JSON has no numbers for them. Tuples become lists."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
