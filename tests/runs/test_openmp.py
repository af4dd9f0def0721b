"""Threads that wait for one another leave the core to other work, unless the user chose otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from repo.common.openmp import SPINS, describe_load

PROGRAM = (
    "import sys, repo; early = 'torch' in sys.modules; import os; print(early, os.environ.get('GOMP_SPINCOUNT', '-'))"
)


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "-")],
    ids=["default", "count chosen", "policy chosen"],
)
def test_importing_repo_shortens_the_spinning_before_torch_is_loaded(chosen: dict[str, str], spins: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | chosen, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", spins]


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="this system has no load average")
@pytest.mark.parametrize(("load", "busy"), [(2.0, False), (2.1, True)])
def test_a_load_beyond_the_cores_is_said(monkeypatch: pytest.MonkeyPatch, load: float, busy: bool) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert bool(describe_load()) is busy
    assert not busy or "load is 2.1 on 2 cores" in describe_load()
