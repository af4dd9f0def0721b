"""The protocol of the worker program: frames, errors and ends, with a stand-in for vLLM (test_vllm.py has vLLM)."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repo.common.errors import UserError
from repo.config.check import check
from repo.config.schema import Config
from repo.models.policy import Policy, load_policy
from repo.rollout.engine import check_engine
from repo.rollout.vllm.engine import VllmEngine, cache_bytes, open_vllm
from repo.rollout.vllm.process import Worker, worker_command, worker_environment
from tests.support.programs import fake_vllm
from tests.support.programs.fake_vllm import ASK

PROGRAM = [sys.executable, "-I", fake_vllm.__file__]
PARENT = """
import os, sys, time
from pathlib import Path
from repo.rollout.vllm.process import Worker, worker_command
folder = Path(sys.argv[1])
worker = Worker(worker_command(sys.argv[2:], folder), folder, os.environ)
worker.ask("load", folder=sys.argv[1])
print(worker.process.pid, flush=True)
worker.ask("sample", prompts=[[9]], seeds=[0])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder that a worker removes when it ends, with weights of step 4."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "step.json").write_text('{"step": 4}')
    return folder


@pytest.fixture
def worker(folder: Path):
    with closing(Worker(worker_command(PROGRAM, folder), folder, os.environ)) as worker:
        worker.ask("load", folder=str(folder))
        yield worker


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return load_policy(str(tiny_model), torch.device("cpu"), True)


def vllm_config(**fields) -> Config:
    return replace(Config(), rollout=replace(Config().rollout, engine="vllm", **fields))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that has ended and is not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_answers_come_whole_and_apart_from_what_is_printed(worker):
    long = [[ASK["print"], *range(5_000)]] * 20
    for prompts in (long, [[ASK["answer"]]], long):
        reply = worker.ask("sample", prompts=prompts, seeds=[0] * len(prompts))
        assert reply == {"tokens": [[3, 4]] * len(prompts), "logps": [[-1.0, -2.0]] * len(prompts), "step": 4}
    assert "and one of a child" in worker.log.read_text()


def test_an_exception_is_a_sentence_with_the_end_of_stderr_and_the_worker_goes_on(worker):
    with pytest.raises(UserError, match="vLLM cannot sample: ValueError: no such token; the last") as error:
        worker.ask("sample", prompts=[[ASK["raise"]]], seeds=[0])
    assert str(error.value).endswith("and more")
    with pytest.raises(UserError, match="vLLM cannot fly: KeyError: 'fly'"):
        worker.ask("fly")
    assert worker.ask("sample", prompts=[[ASK["answer"]]], seeds=[0])["step"] == 4


def test_a_worker_that_dies_is_reported_with_its_last_words(worker):
    with pytest.raises(UserError, match="ended with exit code 3; the last lines of its stderr:\nthe last words"):
        worker.ask("sample", prompts=[[ASK["die"]]], seeds=[0])
    with pytest.raises(UserError, match="ended with exit code 3"):
        worker.ask("load", folder="")


def test_a_worker_that_is_killed_while_it_samples_is_reported(folder):
    with closing(Worker(worker_command(PROGRAM, folder), folder, os.environ)) as worker:
        worker.ask("load", folder=str(folder))
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match="ended with exit code -9"):
            worker.ask("sample", prompts=[[ASK["wait"]]], seeds=[0])


def test_closing_ends_a_worker_that_is_busy_and_removes_its_folder(folder):
    worker = Worker(worker_command(PROGRAM, folder), folder, os.environ)
    worker.ask("load", folder=str(folder))
    assert worker.process.stdin is not None
    worker.process.stdin.write(json.dumps({"do": "sample", "prompts": [[ASK["wait"]]], "seeds": [0]}).encode() + b"\n")
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < 5
    assert worker.process.returncode == 0
    assert not folder.exists()


def test_a_worker_whose_parent_is_killed_ends_and_removes_its_folder(folder):
    command = [sys.executable, "-c", PARENT, str(folder), *PROGRAM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid) and not folder.exists())


def test_a_model_that_vllm_computes_otherwise_is_refused(policy):
    refused = pytest.raises(UserError, match=r"must be transformers for this model.* nats per token")
    with refused, open_vllm(vllm_config(), policy, program=PROGRAM):
        pass


def test_weights_of_another_step_are_noticed(policy, monkeypatch):
    monkeypatch.setattr(VllmEngine, "_measure_gap", lambda *_: 0.0)
    with open_vllm(vllm_config(), policy, program=PROGRAM) as engine:
        engine.update(7)
        assert engine._draw([[ASK["answer"]]], [0])["step"] == 7
        with pytest.raises(UserError, match="holds the weights of step 99 where step 7 samples"):
            engine._draw([[ASK["lie"]]], [0])
        assert [path.name for path in engine.folder.iterdir()] == ["stderr.log"]
    assert not engine.folder.exists()
    assert engine.worker.process.returncode == 0


def test_what_cannot_be_used_is_refused_in_a_sentence(policy):
    shape = policy.model.config
    assert check_engine(Config(), 8, shape) == ""
    with pytest.raises(UserError, match=r"rollout.engine must be transformers in a run of several .* got vllm in 2"):
        check_engine(vllm_config(), 2, shape)
    with pytest.raises(UserError, match="there is no '/no/python'; `make vllm-env` builds that environment"):
        check_engine(vllm_config(vllm_python="/no/python"), 1, shape)
    with pytest.raises(UserError, match=r"has no vLLM; `make vllm-env` .* -m pip install vllm"):
        check_engine(vllm_config(vllm_python=sys.executable), 1, shape)
    with pytest.raises(UserError, match=r"temperature must be >= 0.01 with rollout.engine vllm.* got 0.001"):
        check(vllm_config(temperature=0.001))
    quantised = type(shape)(**shape.to_dict(), quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="for a quantised model"):
        check_engine(vllm_config(), 1, quantised)


def test_the_cache_holds_every_row_whole():
    shape = type("Shape", (), {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64})()
    per_token = 2 * 3 * 64 * 4
    assert cache_bytes(shape, 130, 5, torch.float32) == per_token * (2 * 5 + 1) * 128
    assert cache_bytes(object(), 130, 5, torch.float32) == 2**30


def test_the_worker_gets_the_gpu_of_the_policy(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    environment = worker_environment(1, 8)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("6", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("OMP_NUM_THREADS")
    environment = worker_environment(1, 8)
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("1", "8")
    assert "TRITON_INTERPRET" not in environment
