"""Say which of the packages that ours is compared with cannot be measured here, and why."""

from __future__ import annotations

import torch

from benchmarks.harness.machine import installed


def missing(package: str) -> str | None:
    """Return why a package cannot be used, or None."""
    return None if installed(package) else f"{package} is not installed"


def missing_on_gpu(package: str) -> str | None:
    """Return why a package's Triton kernels cannot be used, or None.

    It looks for the device when it is called, not when this module is imported, after which a process may still fork.
    """
    return missing(package) or (None if torch.cuda.is_available() else "its Triton kernels need a GPU")
