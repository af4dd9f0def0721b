"""Fixtures of all suites: no network, the tiny model on disk, the embedded assets."""

import json
import os
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis.internal.conjecture import providers

from tests.support.products import reduce_products

os.environ["HF_HUB_OFFLINE"] = "1"
# trackio reads this when it is first imported, which transformers and TRL do as well as our logger
_trackio = tempfile.TemporaryDirectory(prefix="trackio-", ignore_cleanup_errors=True)
os.environ["TRACKIO_DIR"] = _trackio.name
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: backend="triton" then takes CPU tensors

if "PYTEST_XDIST_WORKER" in os.environ:  # workers side by side, and their subprocesses, have one core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# Hypothesis draws constants of the modules imported so far, so that a derandomised test would change with any edit of
# the sources and with the tests before it.
if hasattr(providers, "_get_local_constants"):
    providers._get_local_constants = providers.Constants


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = reduce_products(items)


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """A run in this process draws no report, which takes two seconds; what a test module imported is the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("repo.reporting.after_run.draw_report", lambda *_: False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random chat model."""
    from tests.support.tiny import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random classifier with the tiny model's tokenizer."""
    from tests.support.tiny import save_tiny_classifier

    return save_tiny_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="session")
def tiny_prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(train.jsonl, eval.jsonl) with disjoint prompts."""
    from tests.support.tiny import QUESTIONS

    folder = tmp_path_factory.mktemp("prompts")
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    for path, questions in zip(paths, (QUESTIONS[:4], QUESTIONS[4:]), strict=True):
        records = [{"id": f"{path.stem}-{i}", "prompt": q, "category": "test"} for i, q in enumerate(questions)]
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return paths


@pytest.fixture(scope="session")
def tiny_arguments(tiny_model: Path, tiny_prompts: tuple[Path, Path]) -> list[str]:
    """Command line of a run on the tiny model with Python scorers, but for --out."""
    return [
        f"--model.path={tiny_model}",
        f"--data.train={tiny_prompts[0]}",
        f"--data.eval={tiny_prompts[1]}",
        "--scoring.reward=tests.support.scorers:reward",
        "--scoring.cost=tests.support.scorers:cost",
        "--evaluation.judge=none",
        "--rollout.prompts_per_step=2",
        "--rollout.samples_per_prompt=3",
        "--rollout.max_response_tokens=8",
        "--optimizer.lr=1e-3",
        "--steps=4",
        "--save_every=2",
    ]


@pytest.fixture
def options(tiny_arguments: list[str]) -> list[str]:
    """Command line of a run that only trains, but for --out."""
    return [*tiny_arguments, "--evaluation.prompts=0", "--sample_every=0"]


@pytest.fixture
def interruptible():
    """Ctrl-C raises KeyboardInterrupt, also where pytest was started in the background, which ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
