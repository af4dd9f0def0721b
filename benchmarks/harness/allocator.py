"""Choose what the C library does with freed memory while a case is timed, which matters more than most kernels.

With glibc's defaults every tensor of more than 32 MB is mapped, zeroed page by page and unmapped again in each call.
PyTorch's losses allocate many of them and then take several times as long. So that kernels are compared and not page
faults, freed memory is kept while cases are timed, as repo.train does. Cases named after the default allocator show
what a plain script gets; they run in a process of their own, because keeping cannot be undone within a process.
"""

from __future__ import annotations

import ctypes
import sys

from repo.common.malloc import M_MMAP_MAX, M_TRIM_THRESHOLD

KEPT, DEFAULT = "kept", "default"
FRESH = "REPO_BENCH_FRESH"  # set in a process that was started for a case with the default allocator


def give_back() -> None:
    """Restore glibc's defaults and return free memory to the system. Does nothing on other C libraries."""
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 65_536)
        library.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        library.malloc_trim(0)
