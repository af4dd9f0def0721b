"""One thread for small tensors, Triton with the roundings of hardware, every backend and instruction set in turn."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from repo_kernels.backends.cpu.extension import _cpu
from tests.support.kernels.backends import served_by
from tests.support.kernels.interpreter import patch_language_once, round_as_hardware

# The Triton kernels cannot even be imported where Triton is not installed.
collect_ignore = [] if importlib.util.find_spec("triton") else ["backends/triton"]


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


@pytest.fixture(params=["eager", "cpu", "triton"], scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend in turn."""
    with served_by(request.param):
        yield request.param


@pytest.fixture(params=["none"] if _cpu is None else _cpu._isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this machine in turn, in the C++ backend."""
    before = _cpu.isa()
    _cpu._set_isa(request.param)
    yield request.param
    _cpu._set_isa(before)
