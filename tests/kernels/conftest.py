"""The backends that the tests of the public functions run on, and one thread for their small tensors."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: backend="triton" then takes CPU tensors

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from repo_kernels.backends import choice

from .interpreter import patch_language_once, round_as_hardware


@pytest.fixture(autouse=True, scope="package")
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="package")
def _interpreter() -> Iterator[None]:
    """Triton's interpreter with the roundings of the hardware, and quicker."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        round_as_hardware(patch)
        patch_language_once(patch)
        yield


@contextmanager
def served_by(backend: str) -> Iterator[None]:
    """Calls that name no backend go to this one for fp32, bf16 and fp16; fp64 is eager's."""
    if backend == "cpu" and not choice.load("cpu").available():
        pytest.skip("the C++ extension was not built")
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed")

    def chosen(source: Tensor) -> str:
        return backend if source.dtype in choice.KERNEL_DTYPES else "eager"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "default_backend", chosen)
        yield


@pytest.fixture(params=["eager", "cpu", "triton"], scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn."""
    with served_by(request.param):
        yield request.param
