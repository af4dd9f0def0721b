"""Say which of the packages that ours is compared with cannot be measured here, and why."""

from __future__ import annotations

import torch

from benchmarks.harness.machine import installed

NEEDS_GPU = "" if torch.cuda.is_available() else "its Triton kernels need a GPU"


def missing(package: str) -> str | None:
    """Return why a package cannot be used, or None."""
    return None if installed(package) else f"{package} is not installed"
