"""Several processes, data parallel and sharded, over gloo: what they compute together is what one computes alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from repo.common.distributed import World
from tests.runs.test_kills import BARRIER, CREDIT, GATE, INTERIOR, SIMMER, assert_same_run, metrics
from tests.support.programs.processes import config_of, gradient

ALONE = {"OMP_NUM_THREADS": "1"}


def torchrun(processes: int, *arguments: str) -> list[str]:
    launch = (
        ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] if processes > 1 else []
    )
    return [sys.executable, *launch, "-m", *arguments]


def run(processes: int, *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        torchrun(processes, *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | ALONE,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def options(tiny_arguments) -> list[str]:
    return [*tiny_arguments, "--rollout.prompts_per_step=3", "--sample_every=0"]


@pytest.fixture(scope="module")
def single(options, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    run(1, "repo.train", *options, f"--out={out}")
    return out


GAE = ["--algorithm.advantages=gae", "--ptx.coef=0.5"]
CASES = [
    # processes, model.shard, options
    pytest.param(2, 1, [], id="DDP 2", marks=pytest.mark.long),  # a whole run of two is compared below
    pytest.param(2, 0, ["--optimizer.micro_batch_tokens=24"], id="FSDP2 2"),
    pytest.param(3, 0, GAE, id="FSDP2 3"),
    pytest.param(
        4,
        2,
        [*GAE, "--optimizer.micro_batch_tokens=24", "--algorithm.loss_agg_mode=seq-mean-token-mean"],
        id="HSDP 2x2",
        marks=pytest.mark.long,
    ),
]


def both(processes: int, sharding: list[str], options: list[str], model: Path, folder: Path) -> tuple[dict, dict]:
    """What one process finds, and what several find together."""
    run(processes, "tests.support.programs.processes", str(folder / "many"), str(model), *sharding, *options)
    return gradient(World(), config_of(options), str(model)), torch.load(folder / "many", weights_only=True)


@pytest.mark.parametrize(("processes", "shard", "more"), CASES)
def test_loss_and_gradient_are_those_of_one_process(processes, shard, more, tiny_model, tmp_path):
    one, many = both(processes, [f"--model.shard={shard}"], more, tiny_model, tmp_path)
    assert one["losses"].keys() == many["losses"].keys()
    for name, loss in one["losses"].items():
        assert abs(many["losses"][name] - loss) <= 1e-6 * max(one["advantage"], abs(loss)), name
    assert one["gradients"].keys() == many["gradients"].keys()
    whole, difference = (
        torch.cat([f(name).flatten() for name in one["gradients"]]).norm()
        for f in (one["gradients"].__getitem__, lambda n: many["gradients"][n] - one["gradients"][n])
    )
    assert difference <= 1e-5 * whole
    assert torch.allclose(one["stats"], many["stats"], rtol=1e-5, atol=1e-6)
    assert many["found by one"][0].tolist() == [2.0] * 3
    assert many["found by one"][1] is None
    for name in ("logps", "old"):
        assert torch.allclose(one[name], many[name], atol=1e-5)
    assert all(torch.allclose(v, many["values"][s], atol=1e-5) for s, v in one["values"].items())


def assert_close_run(folder: Path, whole: Path) -> None:
    """The same samples, lambda equal, and losses and weights but for rounding."""
    samples = [[json.loads(line) for line in (f / "samples.jsonl").read_text().splitlines()] for f in (folder, whole)]
    assert [s["response"] for s in samples[0]] == [s["response"] for s in samples[1]]
    held_out = [json.loads((f / "eval" / "before.json").read_text())["responses"] for f in (folder, whole)]
    assert [(r["id"], r["response"]) for r in held_out[0]] == [(r["id"], r["response"]) for r in held_out[1]]
    assert held_out[0]
    for a, b in zip(*([json.loads(x) for x in metrics(f)] for f in (folder, whole)), strict=True):
        assert a["lam"] == b["lam"]
        assert {k: v for k, v in a.items() if v is None} == {k: v for k, v in b.items() if v is None}
        known = [k for k in a if a[k] is not None]
        assert all(a[k] == pytest.approx(b[k], rel=1e-4, abs=1e-5) for k in known)
    a, b = (load_file(f / "final" / "model.safetensors") for f in (folder, whole))
    assert max(float((a[name] - b[name]).abs().max()) for name in b) < 1e-4  # AdamW's first steps magnify rounding


@pytest.mark.parametrize(("processes", "shard"), [(2, 1), (2, 0)], ids=["DDP 2", "FSDP2 2"])
def test_a_run_samples_and_learns_what_one_process_does(processes, shard, options, single, tmp_path):
    done = run(processes, "repo.train", *options, f"--model.shard={shard}", f"--out={tmp_path / 'run'}")
    assert_close_run(tmp_path / "run", single)
    assert done.stdout.count("evaluation before training") == 1  # one process speaks
    what = "data parallel" if shard == 1 else "over 2 each by FSDP2"
    assert what in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("shard", [1, 0], ids=["DDP 2", "FSDP2 2"])
def test_a_run_on_pairs_learns_what_one_process_does(shard, options, tmp_path):
    """With one pair in each minibatch, so that one process has none."""
    more = [*options, "--algorithm.method=repo_dpo", "--optimizer.minibatches=3", "--steps=6"]
    run(1, "repo.train", *more, f"--out={tmp_path / 'one'}")
    run(2, "repo.train", *more, f"--model.shard={shard}", f"--out={tmp_path / 'two'}")
    assert_close_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("more", [SIMMER, BARRIER, INTERIOR], ids=["simmer", "barrier", "interior point"])
def test_a_limit_or_a_barrier_moves_as_in_one_process(more, options, tmp_path):
    more = [*more, *options, "--steps=5"]  # presets come first, so that the options override them
    run(1, "repo.train", *more, f"--out={tmp_path / 'one'}")
    run(2, "repo.train", *more, f"--out={tmp_path / 'two'}")
    assert_close_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("shard", [1, 0], ids=["DDP 2", "FSDP2 2"])
def test_credit_is_learned_as_in_one_process_and_goes_on_in_another_number(shard, options, tmp_path):
    more = [*options, *CREDIT, "--steps=6"]
    run(1, "repo.train", *more, f"--out={tmp_path / 'one'}")
    run(2, "repo.train", *more, f"--model.shard={shard}", f"--out={tmp_path / 'two'}")
    assert_close_run(tmp_path / "two", tmp_path / "one")
    assert json.loads(metrics(tmp_path / "one")[-1])["credit_explained_variance"] > 0.3
    run(2, "repo.train", *more, f"--model.shard={shard}", "--steps=3", f"--out={tmp_path / 'part'}")
    run(1, "repo.train", "--resume", str(tmp_path / "part"), "--steps=6", "--model.shard=1")
    assert_close_run(tmp_path / "part", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("shard", [1, 0], ids=["DDP 2", "FSDP2 2"])
def test_a_gate_decides_what_it_does_in_one_process(shard, options, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{i}", "prompt": f"Tell me number {i}."}) + "\n" for i in range(40)))
    more = [*options, f"--data.train={path}", *GATE, "--steps=6"]
    run(1, "repo.train", *more, f"--out={tmp_path / 'one'}")
    run(2, "repo.train", *more, f"--model.shard={shard}", f"--out={tmp_path / 'two'}")
    assert {json.loads(line)["gate_accepted"] for line in metrics(tmp_path / "one")} == {0.0, 1.0}
    assert_close_run(tmp_path / "two", tmp_path / "one")


def test_processes_that_end_right_after_a_collective_end_well():
    """Without care gloo's threads abort a process that is done: in 4 runs of 4 of this script."""
    run(2, "tests.support.programs.leaving")


def test_a_sharded_bf16_policy_has_critics_in_fp32(tiny_model, tmp_path):
    """bf16 weights are gathered as autocast would round them; the critics' are not."""
    one, many = both(2, ["--model.shard=0"], [*GAE, "--model.dtype=bfloat16"], tiny_model, tmp_path)
    for name, loss in one["losses"].items():
        assert many["losses"][name] == pytest.approx(loss, rel=0.02, abs=0.01), name
    for name, value in one["values"].items():
        found = many["values"][name]
        assert (found - value).norm() <= 0.02 * value.norm()
        assert (found.bfloat16() != found).any()  # no product of bf16
    for name, expected in one["gradients"].items():
        assert (many["gradients"][name] - expected).norm() <= 0.1 * expected.norm(), name


def test_a_run_goes_on_with_other_processes(options, single, tmp_path):
    """Sharded over 2, then alone, then sharded over 3."""
    out = tmp_path / "run"
    run(2, "repo.train", *options, "--model.shard=0", "--steps=1", f"--out={out}")
    assert len(list((out / "checkpoints" / "step-000001").glob("shard-*.safetensors"))) == 2
    run(1, "repo.train", "--resume", str(out), "--steps=2")
    assert (out / "checkpoints" / "step-000002" / "state.safetensors").is_file()
    run(3, "repo.train", "--resume", str(out), "--steps=4", "--model.shard=0")
    assert_close_run(out, single)


@pytest.mark.long
@pytest.mark.parametrize("shard", [pytest.param(1, id="DDP"), pytest.param(0, id="FSDP2")])
def test_a_killed_run_of_two_is_the_one_that_was_not(shard, options, tmp_path):
    more = [*options, f"--model.shard={shard}", "--steps=5", "--save_every=1", "--keep=2"]
    run(2, "repo.train", *more, f"--out={tmp_path / 'whole'}")
    out = tmp_path / "run"
    with start(2, *more, f"--out={out}") as process:
        wait_for(out / "metrics.jsonl", 3, process)
        victims = children(process.pid)
        os.kill(victims[-1], signal.SIGKILL)  # one process dies, and all end
        assert process.wait(timeout=60) != 0
        assert not any(alive(pid) for pid in victims)
    run(2, "repo.train", "--resume", str(out))
    assert_same_run(out, tmp_path / "whole")


def test_an_interrupt_of_torchrun_saves_and_says_how_to_go_on(options, tmp_path):
    out = tmp_path / "run"
    with start(2, *options, "--steps=100000", "--save_every=0", f"--out={out}") as process:
        wait_for(out / "metrics.jsonl", 2, process)
        os.kill(process.pid, signal.SIGTERM)  # torchrun passes it on
        printed, _ = process.communicate(timeout=60)
    assert f"torchrun --nproc_per_node 2 -m repo.train --resume {out}" in printed
    done = len(metrics(out))
    assert json.loads((out / "checkpoints" / f"step-{done:06d}" / "state.json").read_text())["step"] == done


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(
            ["--rollout.prompts_per_step=1"],
            "rollout.prompts_per_step must be >= the 2 processes of this run; got 1",
            marks=pytest.mark.long,
        ),
        pytest.param(
            ["--model.shard=3"], "model.shard must divide the 2 processes of this run; got 3", marks=pytest.mark.long
        ),
        (["--scoring.cost=tests.support.scorers:not_a_number"], "gave nan for a response to the prompt"),
        pytest.param(["--out=/proc/nowhere/run"], "cannot write /proc/nowhere/run", marks=pytest.mark.long),
    ],
)
def test_a_users_mistake_ends_all_processes_with_a_sentence(more, message, options, tmp_path):
    done = run(2, "repo.train", *options, f"--out={tmp_path / 'run'}", *more, code=2)
    assert message in done.stderr
    ours = [line for line in done.stderr.splitlines() if "repo/" in line]
    assert not ours, ours  # no traceback through this package


def start(processes: int, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        torchrun(processes, "repo.train", *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | ALONE,
    )


def wait_for(path: Path, lines: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.read_text().count("\n") >= lines):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    """The trainers that a torchrun started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"repo.train" in Path(f"/proc/{child}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()
