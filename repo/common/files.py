"""Files and folders that are whole or not there: written aside, flushed to disk, renamed."""

from __future__ import annotations

import errno
import mmap
import os
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from .errors import UserError

BLOCK, ALIGNMENT = 2**24, 4096  # bytes


def fsync_path(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_past_cache(path: Path, parts: Iterable[memoryview]) -> int:
    """Write bytes one part after another, past the page cache where the file system allows it; returns their CRC-32.

    Gigabytes at every checkpoint would push everything else out of the cache, and fill pages that cost more than the
    disk: 1.6 GB took 2 to 4 s of a core through it, 0.2 s without.
    """
    descriptor = _open_past_cache(path)
    filled = size = checksum = 0
    block = mmap.mmap(-1, BLOCK)  # aligned to pages, as the device wants it
    try:
        for part in parts:
            checksum = zlib.crc32(part, checksum)
            for start in range(0, len(part), BLOCK):
                rest = part[start : start + BLOCK]
                while rest:
                    take = min(len(rest), BLOCK - filled)
                    block[filled : filled + take] = rest[:take]
                    rest, filled, size = rest[take:], filled + take, size + take
                    if filled == BLOCK:
                        _write_all(descriptor, memoryview(block))
                        filled = 0
        if filled:
            _write_all(descriptor, memoryview(block)[: -(-filled // ALIGNMENT) * ALIGNMENT])
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return checksum


def _open_past_cache(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what a file system says that keeps files in memory
            raise
        return os.open(path, flags, 0o644)


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def checksum_of(path: Path) -> int:
    """CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found


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


def create_folder(target: Path, write: Callable[[Path], None]) -> None:
    """As write_folder, for a folder that must be new: UserError, and nothing touched, when the name is taken."""
    staging = partial_of(target.with_name(f"{target.name}.{secrets.token_hex(4)}"))
    try:
        staging.mkdir(parents=True)
        write(staging)
        for path in staging.iterdir():
            fsync_path(path)
        fsync_path(staging)
        staging.rename(target)  # which fails where something is
        fsync_path(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) and target.exists():
            raise UserError(f"cannot create {target}: it exists; choose another folder") from None
        raise UserError(f"cannot write {target}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_parent(path: Path, field: str) -> None:
    """The folder that a file is to be written into. UserError that names the field where it cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{field}: cannot write {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically. UserError when that fails, and what was there stays."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As write_text."""
    staging = partial_of(path)
    try:
        staging.write_bytes(content)
        fsync_path(staging)
        staging.replace(path)
        fsync_path(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; what was there before is intact") from error
