"""Runs of an experiment in this process, without the seconds that each command needs to import the package."""

import importlib

import pytest

from benchmarks.reproduce import runs
from benchmarks.reproduce.runs import Usage


class InTurn:
    """A pool that runs everything in this thread, which a training needs for its signal handlers."""

    def __init__(self, workers):
        pass

    def shutdown(self, cancel_futures):
        pass

    map = staticmethod(map)


@pytest.fixture
def one_thread(monkeypatch):
    """Tasks run in this thread."""
    monkeypatch.setattr(runs, "ThreadPoolExecutor", InTurn)


@pytest.fixture
def in_process(monkeypatch, one_thread):
    """Commands of the package run in this process."""

    def run(arguments, threads, log):
        importlib.import_module(arguments[0]).run_command(list(arguments[1:]))
        return Usage(2.0, 3 * 10**9)

    monkeypatch.setattr(runs, "call", run)
