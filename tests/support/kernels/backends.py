"""Route the calls of a test that name no backend to a chosen one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import Tensor

from repo_kernels.backends import choice


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    """Send calls that name no backend to this one for fp32, bf16 and fp16; fp64 stays with eager."""
    if backend == "cpu" and not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")

    def chosen(source: Tensor) -> str:
        return backend if source.dtype in choice.KERNEL_DTYPES else "eager"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "default_backend", chosen)
        yield
