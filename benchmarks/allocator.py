"""How the C library keeps freed memory while a case is timed, which decides more than most kernels do.

By glibc's default every tensor of more than 32 MB is mapped, zeroed page by page and unmapped again in each call: on
this machine's loss from logits that is four fifths of the time of PyTorch, whose temporaries are many, and next to
nothing of ours. So that kernels are compared and not page faults, freed memory is kept while cases are timed, as
repo.train does; the cases that are named after the default show it as a plain script has it.
"""

from __future__ import annotations

import ctypes
import sys

from repo.memory import M_MMAP_MAX, M_TRIM_THRESHOLD, keep_freed_memory

KEPT, DEFAULT = "kept", "default"


def use(allocator: str) -> None:
    """Keep freed memory, or go back to glibc's defaults and give back what is free. Nothing on other C libraries."""
    if allocator == KEPT:
        keep_freed_memory()
        return
    library = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 65_536)
        library.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        library.malloc_trim(0)
