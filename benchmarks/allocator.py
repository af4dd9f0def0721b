"""How the C library keeps freed memory while a case is timed, which decides more than most kernels do.

By glibc's default every tensor of more than 32 MB is mapped, zeroed page by page and unmapped again in each call, and
PyTorch's losses make many of them: they then take several times as long. So that kernels are compared and not page
faults, freed memory is kept while cases are timed, as repo.train does. The cases that are named after the default
allocator show it as a plain script has it, in a process of their own, since what is kept once stays kept.
"""

from __future__ import annotations

import ctypes
import sys

from repo.common.malloc import M_MMAP_MAX, M_TRIM_THRESHOLD

KEPT, DEFAULT = "kept", "default"
FRESH = "REPO_BENCH_FRESH"  # set in a process that was started for a case with the default allocator


def give_back() -> None:
    """glibc's defaults, and what is free goes back to the system. Nothing on other C libraries."""
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 65_536)
        library.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        library.malloc_trim(0)
