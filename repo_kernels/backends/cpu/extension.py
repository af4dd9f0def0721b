"""The compiled extension `repo_kernels._cpu`: the only module that imports it.

It is missing when the package was built with `REPO_KERNELS_CPU=OFF` or was not built at all.
"""

from __future__ import annotations

try:
    from ... import _cpu
except ImportError:
    _cpu = None  # type: ignore[assignment]


def available() -> bool:
    """Return whether the extension was built."""
    return _cpu is not None
