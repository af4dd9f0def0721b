"""A pytest plugin that writes each test's outcome as a line of JSON when it is known: `--outcomes FILE`.

So a run that is stopped at its time limit still tells what passed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file that gets a line of JSON per test")


class Writer:
    """Writes outcomes; with pytest-xdist in the process that collects them."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, test: str, outcome: str, message: str = "") -> None:
        """Append a line."""
        with self.file.open("a", encoding="utf-8") as lines:
            print(json.dumps({"test": test, "outcome": outcome, "message": message[:300]}), file=lines)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(report.nodeid, report.outcome, reason(report))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(report.nodeid, "not collected", reason(report))


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the line that says why a test failed or was skipped."""
    if report.outcome == "passed":
        return ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = [line for line in str(report.longrepr).splitlines() if line.startswith("E ")]
    return lines[0].removeprefix("E").strip() if lines else str(report.longrepr)[-200:]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--outcomes") and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Writer(config.getoption("--outcomes")), "outcomes of benchmarks.gpu")
