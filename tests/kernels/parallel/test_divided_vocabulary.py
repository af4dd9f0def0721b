"""A head divided among 1 to 4 processes gives what the whole head gives in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SIZES, BACKENDS = (1, 2, 3, 4), ("eager", "cpu", "triton")
LIMITS = {"eager": 1e-13, "cpu": 2e-6, "triton": 2e-6}  # relative, in fp64 and fp32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("divided")
    command = [sys.executable, "-m", "tests.support.programs.divided_vocabulary", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
def test_loss_statistics_and_gradients_are_those_of_one_process(found: dict[str, Any], size: int, backend: str) -> None:
    cases = [x for x in found["cases"] if x["case"].startswith(f"{size} processes, {backend}")]
    assert len(cases) == (1 if backend == "triton" else 8)
    wrong = {x["case"]: x["errors"] for x in cases if max(x["errors"].values()) > LIMITS[backend]}
    assert not wrong


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_dtensor_that_is_cut_unevenly_is_taken_as_it_is(found: dict[str, Any], size: int) -> None:
    (case,) = (x for x in found["cases"] if x["case"] == f"{size} processes, DTensor")
    assert max(case["errors"].values()) < 2e-6


def test_what_a_divided_head_does_not_take_is_named(found: dict[str, Any]) -> None:
    softcap, full, index, group, traced, *second = found["refused"]
    assert softcap.startswith(
        "ValueError: softcap must be None where the vocabulary is divided among processes; got 3.0"
    )
    assert full.startswith("ValueError: kl_estimator='full' takes a whole vocabulary")
    assert index.startswith("IndexError: token_ids must lie in [0, 24); got 99")
    assert group.startswith("TypeError: group must be a torch.distributed process group or None; got str")
    assert "cannot be traced by torch.compile" in traced
    assert all("can be differentiated once: create_graph=True is not supported" in message for message in second)
    assert len(second) == 2
    expected = (
        "ValueError: group needs as many rows of the vocabulary in every process; got 3 to 4: pass a DTensor weight"
    )
    assert [message[: len(expected)] for message in found["unequal"]] == [expected] * 2
    assert found["too few rows"] == "ValueError: weight must have a row for every process; got 9 rows, 3 each for 4"
