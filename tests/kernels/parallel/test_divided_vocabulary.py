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
SIZES = (1, 2, 3, 4)
CASES = {(size, backend): 12 for size in SIZES for backend in ("eager", "cpu")} | {(2, "triton"): 2, (3, "triton"): 1}
LIMITS = {"eager": 1e-13, "cpu": 2e-6, "triton": 2e-6}  # relative, in fp64 and fp32


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("divided")
    command = [sys.executable, "-m", "tests.support.programs.divided_vocabulary", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("size", "backend"), CASES)
def test_loss_statistics_and_gradients_are_those_of_one_process(found: dict[str, Any], size: int, backend: str) -> None:
    cases = [x for x in found["cases"] if x["case"].startswith(f"{size} processes, {backend}")]
    assert len(cases) == CASES[size, backend]
    wrong = {x["case"]: x["errors"] for x in cases if max(x["errors"].values()) > LIMITS[backend]}
    assert not wrong


@pytest.mark.parametrize("size", SIZES[1:])
def test_a_dtensor_that_is_cut_unevenly_is_taken_as_it_is(found: dict[str, Any], size: int) -> None:
    (case,) = (x for x in found["cases"] if x["case"] == f"{size} processes, DTensor")
    assert max(case["errors"].values()) < 2e-6


def test_a_compiled_call_is_one_graph_with_the_same_numbers(found: dict[str, Any]) -> None:
    (case,) = (x for x in found["cases"] if x["case"] == "compiled")
    assert case["errors"].pop("graphs") <= 2  # the second has the numbers as inputs
    assert max(case["errors"].values()) < 1e-6


REFUSED = {
    "full": "ValueError: kl_estimator='full' takes a whole vocabulary; got one divided among processes: use 'k1'",
    "kept": "ValueError: kept takes a whole vocabulary; got one divided among processes: use kept=None",
    "index": "IndexError: token_ids must lie in [0, 24); got 99",
    "group": "TypeError: group must be a torch.distributed process group or None; got str",
    "another's group": "ValueError: group must have this process in it; got NON_GROUP_MEMBER",
    "transform": "RuntimeError: a vocabulary that is divided among processes cannot be transformed by torch.func",
}


def test_what_a_divided_head_does_not_take_is_named(found: dict[str, Any]) -> None:
    told = found["refused"]
    expected = REFUSED | {f"{name} of logits": REFUSED[name] for name in ("full", "kept", "group", "transform")}
    expected["inplace"] = "ValueError: inplace=True is for surrogate='clip', ratio_level='token' and a whole vocabulary"
    for name, form in (("second order", "linear_"), ("second order of logits", "")):
        once = "selective_log_softmax can be differentiated once: create_graph=True is not supported"
        expected[name] = f"RuntimeError: {form}{once}"
    assert {name: message[: len(expected[name])] for name, message in told.items()} == expected
    expected_sizes = (
        "ValueError: group needs as many rows of the vocabulary in every process; got 3 to 4: pass a DTensor weight"
    )
    assert [message[: len(expected_sizes)] for message in found["unequal"]] == [expected_sizes] * 2
    assert found["too few rows"] == "ValueError: weight must have a row for every process; got 9 rows, 3 each for 4"


def test_an_id_outside_of_the_vocabulary_is_one_that_triton_makes_nan_of(found: dict[str, Any]) -> None:
    # of a GPU, where values are not checked: no process may pass it over
    assert found["beyond"] == [[-1, -1, -100], [True, True, False]]
