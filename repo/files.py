"""Files and folders that are whole or not there: written aside, flushed to disk, renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def fsync_path(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_folder(source: Path, target: Path) -> None:
    """Rename `source` to `target`. An existing target steps aside first and comes back if the rename fails."""
    aside = target.with_name(f".{target.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    try:
        source.rename(target)
    except OSError:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    fsync_path(target.parent)


def partial_of(target: Path) -> Path:
    """Where `target` is written before it is renamed."""
    return target.with_name(f".{target.name}.partial")


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Create or replace the folder `target` by what `write` puts into an empty one, or leave it as it was.

    Raises UserError when writing fails, whatever library it failed in.
    """
    staging = partial_of(target)
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        write(staging)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                path.chmod(0o644)
                fsync_path(path)
        fsync_path(staging)
        replace_folder(staging, target)
    except UserError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"cannot write {target}: {reason}; what was there before is intact") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically. UserError when that fails, and what was there stays."""
    staging = partial_of(path)
    try:
        staging.write_text(text, encoding="utf-8")
        fsync_path(staging)
        staging.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error
