"""The loop part of `make gpu`: its table, and what becomes of a stage that fails. test_gpu_script.py rehearses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.loop import measuring
from benchmarks.gpu.loop.goals import GOALS, LARGE, REHEARSED, SHAPES, SMALL
from benchmarks.gpu.loop.models import NoTokenizer
from benchmarks.gpu.loop.table import loop_table
from benchmarks.gpu.plan import REHEARSAL
from benchmarks.harness.process import Deadline
from benchmarks.harness.results import LIMIT, OURS, Case, Row, read


def case(*rows: Row) -> Case:
    parameters = {"decoded tokens": 256}
    return Case("gpu_loop", SMALL, parameters, "operations", "", "update", list(rows), {})


def test_each_row_stands_beside_its_goal_and_what_it_took_before() -> None:
    lines = loop_table(
        [
            case(
                Row("matrix product", LIMIT, [1.0], work=8e14),
                Row("first update", OURS, [0.9], work=1e14),
                Row("update", OURS, [0.5, 0.4, 0.6], work=1.5e14),
                Row("decoding", OURS, [0.64], tokens=16_384.0),
                Row("whole step", OURS, reason="fails: OutOfMemoryError"),
            )
        ]
    ).splitlines()
    assert [line.split(" | ")[1:4] for line in lines[2:]] == [
        ["first update", "0.900 s, 111 TFLOP/s, 14% of a matrix product, 1.8 x the median", "<= 2 x the median"],
        ["update", "0.500 s, 300 TFLOP/s, 38% of a matrix product", ">= 300 TFLOP/s"],
        ["decoding", "0.640 s, 2.50 ms a step, 25600 tokens/s", "<= 2.5 ms a step"],
    ]
    assert "8.6 ms a step, 7.4 k tokens/s |" in lines[-1]


def test_a_stage_that_fails_ends_its_model_and_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measuring, "REHEARSED", {LARGE: REHEARSED[LARGE]})

    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(measuring, "read_reference", fail)
    measuring.measure(REHEARSAL, tmp_path, Deadline.in_seconds(60))
    (found,) = read(tmp_path / "gpu_loop.json")
    assert [row.way for row in found.rows if row.seconds] == ["matrix product", "first update", "update"]
    assert found.rows[-1].way == "reference"
    assert found.rows[-1].reason == "fails: RuntimeError: no kernel for this"
    assert found.notes["Memory"].startswith("said to take ")
    measuring.measure(REHEARSAL, tmp_path / "late", Deadline.in_seconds(-1))
    assert f"no time for {LARGE}" in capsys.readouterr().out


def test_models_and_their_rehearsals_are_the_same_and_have_goals() -> None:
    assert SHAPES.keys() == REHEARSED.keys() == GOALS.keys()
    assert [shape.lora > 0 for shape in SHAPES.values()] == [shape.lora > 0 for shape in REHEARSED.values()]
    assert NoTokenizer().batch_decode([[1], [2, 3]]) == ["", ""]
