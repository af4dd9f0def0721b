"""Checkpoints: whole or not there, whatever happens while they are written; the newest and the best stay."""

import json
import pickle
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from repo.common.distributed import ALONE
from repo.common.errors import UserError
from repo.common.files import write_past_cache
from repo.common.seeds import random_state, set_random_state
from repo.runs import checkpoint, state_files
from repo.training.optimizer import BFloat16AdamW
from tests.support.crash import Died, machine


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(2, 5)).square().sum().backward()
    optimizer.step()


def state(step: int, safe_rate: float = 0.5, reward: float = 0.0) -> checkpoint.State:
    records = [{"safe_rate": safe_rate, "reward_mean": reward}]
    return checkpoint.make_state(step, {"value": float(step)}, 0, {"metrics": 10 * step}, records)


def saver_of(run: Path, keep: int = 1, target: float = 0.9) -> checkpoint.Saver:
    return checkpoint.Saver(run, keep, target, ALONE, sharded=False)


def save(run: Path, step: int, model, optimizer, **options) -> None:
    saver = saver_of(run, options.pop("keep", 1), options.pop("target", 0.9))
    saver.start(state(step, **options), model, optimizer)
    saver.wait()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def second_save(run: Path, at: int | None) -> tuple[list[dict], list[str]]:
    """Save step 1, train, die at call `at` of saving step 2. Returns the weights after each step, and the calls."""
    (run / "checkpoints").mkdir(parents=True)
    model, optimizer = make_model()
    after = []
    for step in (1, 2):
        train_step(model, optimizer)
        after.append(weights(model))
        if step == 1:
            save(run, 1, model, optimizer)
    with machine(run, at) as found:
        try:
            save(run, 2, model, optimizer, safe_rate=0.8)  # the better one, so that the first one goes
        except Died:
            assert at is not None
        else:
            assert at is None
    return after, found.calls


with tempfile.TemporaryDirectory() as folder:
    CALLS = second_save(Path(folder) / "run", None)[1]


def test_a_save_makes_the_calls_that_can_fail():
    names = {call.split()[1] for call in CALLS}
    assert {"write", "write_text", "fsync", "rename", "replace", "unlink", "rmdir"} <= names
    assert len(CALLS) > 40


@pytest.mark.parametrize("at", range(len(CALLS)), ids=[f"{i}-{call.replace(' ', '-')}" for i, call in enumerate(CALLS)])
def test_a_death_at_any_call_of_a_save_leaves_a_whole_checkpoint(at, tmp_path):
    run = tmp_path / "run"
    after, _ = second_save(run, at)
    folder, left_out = checkpoint.find(run)
    assert left_out == []
    found, _ = checkpoint.read_state(folder)
    assert found.step in (1, 2)
    assert found.offsets == {"metrics": 10 * found.step}
    model, optimizer = make_model()
    checkpoint.restore(folder, model, optimizer)
    assert equal(weights(model), after[found.step - 1])
    for step in range(found.step + 1, 4):  # and the run goes on from there to the same end
        train_step(model, optimizer)
        save(run, step, model, optimizer)
    folder, left_out = checkpoint.find(run)
    assert checkpoint.read_state(folder)[0].step == 3
    assert left_out == []
    assert not list((run / "checkpoints").glob(".*"))
    straight, straight_optimizer = make_model()
    for _ in range(3):
        train_step(straight, straight_optimizer)
    assert equal(weights(model), weights(straight))


def damage(folder: Path, how: str) -> None:
    path = folder / "state.safetensors"
    content = bytearray(path.read_bytes())
    if how == "a bit":
        content[-3] ^= 4
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[:-7])
    elif how == "missing":
        path.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "manifest no json":
        (folder / "manifest.json").write_text("{")
    elif how == "manifest no object":
        (folder / "manifest.json").write_text("[1]")
    elif how == "more files":
        (folder / "zzz.safetensors").write_bytes(b"")
    else:
        (folder / "state.json").write_text("{}")


DAMAGES = "a bit,cut,missing,no manifest,manifest no json,manifest no object,more files,state".split(",")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_left_out_with_a_sentence(how, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    model, optimizer = make_model()
    for step in (1, 2):
        train_step(model, optimizer)
        save(tmp_path, step, model, optimizer, keep=2)
    damage(tmp_path / "checkpoints" / "step-000002", how)
    folder, left_out = checkpoint.find(tmp_path)
    assert folder.name == "step-000001"
    assert len(left_out) == 1
    assert "step-000002 is left out: " in left_out[0]
    damage(tmp_path / "checkpoints" / "step-000001", how)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="no checkpoint of .* is intact, and nothing was changed"):
        checkpoint.find(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_damaged_one_never_counts_among_the_newest_that_are_kept(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    model, optimizer = make_model()
    for step in (2, 4):
        train_step(model, optimizer)
        save(tmp_path, step, model, optimizer, keep=2)
    damage(tmp_path / "checkpoints" / "step-000004", "cut")
    save(tmp_path, 3, model, optimizer)  # the run went on from step 2
    assert checkpoint.find(tmp_path)[0].name == "step-000003"
    assert 4 not in checkpoint.steps_of(tmp_path / "checkpoints")


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "step-000001/../../x", "", "step-1\n"])
def test_a_pointer_names_a_folder_beside_it_and_nothing_else(name, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path, 1, *make_model())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(name)
    assert checkpoint.pointed(tmp_path / "checkpoints" / "latest") is None
    assert checkpoint.find(tmp_path)[0].name == "step-000001"


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        # (safe rate, reward) of steps 1, 2, ...: the highest reward among the safe ones
        ([(0.95, 1.0), (0.92, 3.0), (0.99, 2.0), (0.5, 9.0)], 2),
        ([(0.5, 9.0), (0.7, 0.0), (0.6, 5.0)], 2),  # none is safe enough: the safest
        ([(0.7, 9.0), (0.9, -5.0), (0.89, 5.0)], 2),
        ([(0.9, 1.0), (0.9, 1.0)], 1),  # a tie changes nothing
    ],
)
def test_the_best_stays_beside_the_newest(scores, best, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    model, optimizer = make_model()
    for step, (safe_rate, reward) in enumerate(scores, 1):
        save(tmp_path, step, model, optimizer, safe_rate=safe_rate, reward=reward)
    assert (tmp_path / "checkpoints" / "best").read_text() == f"step-{best:06d}"
    assert sorted(checkpoint.steps_of(tmp_path / "checkpoints")) == sorted({best, len(scores)})


def test_the_score_is_the_mean_over_the_steps_since_the_one_before():
    records = [{"safe_rate": 0.5, "reward_mean": 1.0}, {"safe_rate": 1.0, "reward_mean": 4.0}]
    found = checkpoint.make_state(2, {}, 0, {}, records)
    assert (found.safe_rate, found.reward) == (0.75, 2.5)


def test_the_file_is_one_that_the_library_reads(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5, 2).bfloat16(),
        "number": torch.tensor(7.0),
        "none": torch.zeros(0, 3),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "turned": torch.randn(4, 3).t(),
        "large": torch.randn(1500, 3001),
    }
    checksums = state_files.write(tmp_path, tensors)
    found = load_file(tmp_path / "state.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert checksums == {"state.safetensors": checkpoint.checksum_of(tmp_path / "state.safetensors")}


@pytest.mark.parametrize("sizes", [[], [0], [1], [2**24], [2**24 - 1, 2], [5, 2**24 + 4097, 3]])
def test_bytes_past_the_cache_are_the_bytes_given(sizes, tmp_path):
    parts = [random.Random(size).randbytes(size) for size in sizes]
    found = write_past_cache(tmp_path / "a", map(memoryview, parts))
    assert (tmp_path / "a").read_bytes() == b"".join(parts)
    assert found == checkpoint.checksum_of(tmp_path / "a")


def test_a_file_system_in_memory_does_it_too():
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("no /dev/shm here")
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        write_past_cache(Path(folder) / "a", [memoryview(b"abc")])
        assert (Path(folder) / "a").read_bytes() == b"abc"


@pytest.mark.parametrize("kind", ["AdamW", "BFloat16AdamW", "AdamW8bit"])
def test_every_optimizer_goes_on_as_if_nothing_had_happened(kind, tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(80, 64), nn.LayerNorm(64))  # a matrix of >= 4096, which 8 bit quantises
        if kind == "AdamW":
            return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        if kind == "BFloat16AdamW":
            return model, BFloat16AdamW(model.parameters(), betas=(0.9, 0.95))
        return model, pytest.importorskip("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=0.1)

    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.ones(2, 80)).pow(3).sum().backward()
        optimizer.step()

    (tmp_path / "checkpoints").mkdir()
    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    save(tmp_path, 3, model, optimizer)
    again, again_optimizer = make()
    checkpoint.restore(checkpoint.find(tmp_path)[0], again, again_optimizer)
    for _ in range(2):
        step(model, optimizer)
        step(again, again_optimizer)
    assert equal(weights(model), weights(again))


def test_random_numbers_of_scorers_go_on():
    torch.rand(3), np.random.rand(2), random.random(), random.gauss(0, 1)
    saved = json.loads(json.dumps(random_state()))
    expected = torch.rand(2).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)
    set_random_state(saved)
    assert (torch.rand(2).tolist(), np.random.randn(3).tolist(), random.random(), random.gauss(0, 1)) == expected


def test_a_checkpoint_of_another_model_or_version_is_a_sentence(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    save(tmp_path, 1, *make_model())
    folder = checkpoint.find(tmp_path)[0]
    other = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    with pytest.raises(UserError, match="belongs to another model"):
        checkpoint.restore(folder, other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(UserError, match="belongs to another model: its parameters have other names"):
        checkpoint.restore(folder, other[0], torch.optim.AdamW(other.parameters()))
    (folder / "state.json").write_text('{"step": 3}')
    with pytest.raises(UserError, match=r"state.json is not a state that this version can read"):
        checkpoint.read_state(folder)


def test_nothing_in_a_checkpoint_is_unpickled(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    model, optimizer = make_model()
    train_step(model, optimizer)
    save(tmp_path, 1, model, optimizer)

    def refused(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refused)
    monkeypatch.setattr(pickle, "loads", refused)
    monkeypatch.setattr(torch, "load", refused)
    checkpoint.restore(checkpoint.find(tmp_path)[0], model, optimizer)


def test_a_save_that_fails_is_told_when_it_is_waited_for(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    model, optimizer = make_model()
    save(tmp_path, 1, model, optimizer)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    saver = saver_of(tmp_path)
    saver.start(state(2), model, optimizer)
    with pytest.raises(UserError, match=r"cannot write .*step-000002: .*; what was there before is intact"):
        saver.wait()
    saver.wait()  # told once


@pytest.mark.parametrize(
    ("accepted", "best"),
    [([None, 2, 2], 2), ([None, None, 3], 3), ([1, 1, 3], 1), ([1, 1, 1], 1)],
    ids=["the gate came later", "the gate came last", "accepted, of less merit", "taken back"],
)
def test_only_an_accepted_policy_is_the_best_beside_a_gate(accepted, best, tmp_path):
    """Rewards fall from step to step; in the last case they rise."""
    model, optimizer = make_model()
    rewards = [1.0, 2.0, 3.0] if accepted == [1, 1, 1] else [3.0, 2.0, 1.0]
    for step, (by, reward) in enumerate(zip(accepted, rewards, strict=True), 1):
        saver = saver_of(tmp_path, keep=9)
        gate = {} if by is None else {"accepted": by}
        saver.start(replace(state(step, safe_rate=1.0, reward=reward), gate=gate), model, optimizer)
        saver.wait()
    assert (tmp_path / "checkpoints" / "best").read_text() == f"step-00000{best}"
