"""The benchmarks on a GPU: the same commands, with the peers that need one, events and clocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.harness.machine import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
        reason="needs a GPU and TRITON_INTERPRET=0 (`make test-gpu`)",
    ),
]


def test_a_suite_measures_on_the_gpu_what_the_cpu_had_to_leave_out(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_loss.py", "benchmarks/bench_linear.py", "--quick"]
    done = subprocess.run([*command, "--save", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    cases = [case for file in tmp_path.glob("*.json") for case in json.loads(file.read_text())["cases"]]
    timed = {row["way"] for case in cases for row in case["rows"] if row["seconds"]}
    assert {"Liger triton_grpo_loss", "cut-cross-entropy + PyTorch", "repo_loss", "linear_repo_loss"} <= timed
    assert all(case["provenance"]["processor"] == torch.cuda.get_device_name() for case in cases)
    assert all("clocks.sm" in case["provenance"]["gpu"] for case in cases)
