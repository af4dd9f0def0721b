"""Small blocks, so that short rows take every path of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from repo_kernels.backends.triton import variants
from repo_kernels.backends.triton.forms import LaunchForm
from tests.support.kernels.interpreter import round_as_hardware
from tests.support.kernels.triton_rows import PIECES


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        round_as_hardware(patch)
        with np.errstate(all="ignore"):
            yield


def forget_variants() -> None:
    for chosen in (variants.fused_variant, variants.statistics_variant, variants.apply_variant, variants.scale_variant):
        chosen.cache_clear()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Blocks so small that a row of a few hundred logits has several."""
    if "real_blocks" not in request.fixturenames:
        for choose in ("fused_form", "single_sweep_form"):
            monkeypatch.setattr(variants, choose, lambda *_: LaunchForm(warps=1, pieces=PIECES))
    forget_variants()
    yield
    forget_variants()


@pytest.fixture
def real_blocks() -> None:
    """Blocks as on a GPU."""
