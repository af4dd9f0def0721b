"""The versions of Triton that are supported, and how to run with one that is not the environment's.

A version is installed without its dependencies in a folder of its own, `triton/VERSION` in the environment, which is
put before everything else that Python finds. torch stays the environment's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """One supported version of Triton.

    Args:
        version: the last patch that a release of torch pins.
        torch: the releases of torch that pin it.
        also: packages that its interpreter needs in another version than the environment's.
        environment: variables that it needs to compile for all targets.
    """

    version: str
    torch: tuple[str, ...]
    also: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()


# Up to 3.6 the interpreter takes an array of one element for a number, which numpy refuses from 2.4 on.
OLD_NUMPY = "numpy<2.4"
# Triton 3.4 carries no linker for AMD. What is read of a kernel is the assembly before it is linked.
NO_LINKER = ("TRITON_HIP_LLD_PATH", shutil.which("true") or "/bin/true")
RELEASES = (
    Release("3.4.0", ("2.8",), (OLD_NUMPY,), (NO_LINKER,)),
    Release("3.5.1", ("2.9",), (OLD_NUMPY,)),
    Release("3.6.0", ("2.10", "2.11"), (OLD_NUMPY,)),
    Release("3.7.1", ("2.12", "2.13")),
    Release("3.8.0", ("2.14",)),
    Release("3.9.0", ("2.15",)),
)
VERSIONS = tuple(release.version for release in RELEASES)


def current() -> str | None:
    """Return the version of Triton that Python finds first, or None without one."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _release(version: str) -> Release:
    return next((release for release in RELEASES if release.version == version), Release(version, ()))


def _install(requirements: Iterable[str], folder: Path) -> None:
    """Install packages in a new folder, which appears complete or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--no-compile", "--target", f"{part}/new", *requirements], check=True)
        try:
            os.rename(f"{part}/new", folder)
        except OSError:  # another process was quicker
            if not folder.is_dir():
                raise


def folder_of(version: str) -> Path | None:
    """Return the folder that holds this version of Triton, installed if it was not; None for the environment's own."""
    if version == current():
        return None
    folder = Path(sys.prefix) / "triton" / version
    if not folder.is_dir():
        _install([f"triton=={version}", *_release(version).also], folder)
    return folder


def variables(version: str) -> dict[str, str]:
    """Return the environment variables with which Python finds this version of Triton first."""
    folder = folder_of(version)
    paths = [str(folder)] if folder else []
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {"PYTHONPATH": os.pathsep.join(paths), **dict(_release(version).environment)}


def use(version: str) -> None:
    """Make this process import this version of Triton, to compile with; its interpreter needs `run`."""
    if "triton" in sys.modules:
        raise RuntimeError("a version of Triton must be chosen before the first is imported")
    os.environ.update(variables(version))
    if folder := folder_of(version):
        sys.path.insert(0, str(folder))


def run(version: str, command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command (without the interpreter's name) with this version of Triton, and capture what it prints."""
    return subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **variables(version), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
