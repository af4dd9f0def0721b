"""Every instruction set of this machine, and the number of threads as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from repo_kernels.backends import cpu

if cpu.available():
    from repo_kernels import _cpu

    ISAS = _cpu._isas()
else:
    ISAS = ["none"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu._set_isa(request.param)
    yield request.param
    _cpu._set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
