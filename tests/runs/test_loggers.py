"""Loggers: what the packages themselves read back, resumed runs go on, failures are told and stop no training."""

import importlib
import json
import math
import struct
import subprocess
import sys

import pytest

from repo.common.errors import UserError
from repo.runs.loggers import Logger, check_loggers, make_loggers

CONFIG = {"steps": 4, "optimizer": {"lr": 1e-3, "betas": (0.9, 0.95)}}
RECORD = {"step": 7, "reward_mean": 0.5, "skipped": 0, "reward_safe_mean": math.nan, "cost_max": math.inf, "note": "x"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def log(name, folder, records, first_step=0):
    """A run, or the rest of a resumed one."""
    (logger,) = make_loggers([name], folder, CONFIG, first_step)
    for step, record in enumerate(records, first_step):
        logger.log(record, step)
    logger.close()


def read_tensorboard(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()


def scalars(events, key):
    return [(e.step, e.value) for e in events.Scalars(key)]


def read_wandb(folder):
    """The records of every offline run, by kind: a 7-byte header, then LevelDB's log format in blocks of 32 KiB.

    The service of wandb 0.31 writes after `finish` has returned; `teardown` waits for it.
    """
    pytest.importorskip("wandb").teardown()
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found = {"run": [], "history": []}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, at, part = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            _, size, kind = struct.unpack_from("<IHB", data, at)
            part, at = part + data[at + 7 : at + 7 + size], at + 7 + size
            if kind in (1, 4):  # a whole record, or the last part of one
                record = pb.Record.FromString(part)
                part, name = b"", record.WhichOneof("record_type")
                if name in found:
                    found[name].append(getattr(record, name))
    return found


def wandb_metrics(history):
    items = {item.nested_key[0]: json.loads(item.value_json) for item in history.item}
    return {k: v for k, v in items.items() if not k.startswith("_")}


def trackio_storage():
    return pytest.importorskip("trackio.sqlite_storage").SQLiteStorage


def trackio_metrics(project, **which):
    return [
        {k: v for k, v in line.items() if k != "timestamp"} for line in trackio_storage().get_logs(project, **which)
    ]


def test_tensorboard_gets_the_finite_numbers_and_the_config(folder):
    log("tensorboard", folder, [RECORD, {"reward_mean": 0.25}])
    events = read_tensorboard(folder)
    assert sorted(events.Tags()["scalars"]) == ["reward_mean", "skipped"]
    assert scalars(events, "reward_mean") == [(0, 0.5), (1, 0.25)]
    (config,) = events.Tensors("config/text_summary")
    text = config.tensor_proto.string_val[0].decode()
    assert json.loads(text.removeprefix("```json").removesuffix("```")) == json.loads(json.dumps(CONFIG))


@pytest.mark.parametrize("first", [0, 2])
def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(first, folder):
    log("tensorboard", folder, [{"lam": float(step)} for step in range(4)])
    log("tensorboard", folder, [{"lam": 10.0 + step} for step in range(3)], first_step=first)
    expected = [(step, float(step)) for step in range(first)] + [(first + step, 10.0 + step) for step in range(3)]
    assert scalars(read_tensorboard(folder), "lam") == expected


def test_wandb_gets_the_finite_numbers_the_config_and_the_name_of_the_folder(folder, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "safety")
    log("wandb", folder, [RECORD, {"reward_mean": 0.25}])
    found = read_wandb(folder)
    assert [wandb_metrics(h) for h in found["history"]] == [{"reward_mean": 0.5, "skipped": 0}, {"reward_mean": 0.25}]
    assert [h.step.num for h in found["history"]] == [0, 1]
    run = found["run"][0]
    assert (run.project, run.display_name) == ("safety", "run")
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.95]}


def test_a_resumed_run_is_the_same_wandb_run_even_when_moved_and_another_is_not(folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    log("wandb", folder, [RECORD])
    moved = folder.rename(tmp_path / "moved")
    log("wandb", moved, [RECORD], first_step=1)
    another = tmp_path / "another"
    another.mkdir()
    log("wandb", another, [RECORD])
    first, other = read_wandb(moved), read_wandb(another)
    assert len({run.run_id for run in first["run"]}) == 1
    assert sorted(h.step.num for h in first["history"]) == [0, 1]
    assert other["run"][0].run_id != first["run"][0].run_id
    assert first["run"][0].project == "repo"


def test_trackio_gets_the_finite_numbers_and_the_config(folder, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "numbers")
    log("trackio", folder, [RECORD, {"reward_mean": 0.25}])
    expected = [{"reward_mean": 0.5, "skipped": 0, "step": 0}, {"reward_mean": 0.25, "step": 1}]
    assert trackio_metrics("numbers", run="run") == expected
    assert trackio_storage().get_run_config("numbers", "run")["optimizer"] == {"lr": 1e-3, "betas": [0.9, 0.95]}


def test_a_resumed_run_is_the_same_trackio_run_and_another_folder_of_its_name_is_not(folder, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "resumed")
    log("trackio", folder, [{"lam": 1.0}])
    log("trackio", folder, [{"lam": 2.0}], first_step=1)
    assert trackio_metrics("resumed", run="run") == [{"lam": 1.0, "step": 0}, {"lam": 2.0, "step": 1}]
    assert len(trackio_storage().get_runs("resumed")) == 1
    other = tmp_path / "elsewhere" / "run"
    other.mkdir(parents=True)
    log("trackio", other, [{"lam": 3.0}])
    assert len(trackio_storage().get_runs("resumed")) == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_a_sentence_with_the_command(name, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    for act in (check_loggers, lambda names: make_loggers(names, folder, CONFIG)):
        with pytest.raises(UserError, match=f"loggers: {name} needs its package: pip install {name}"):
            act([name])
    assert list(folder.iterdir()) == []


def test_the_folder_that_wandb_leaves_is_not_taken_for_the_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    with pytest.raises(UserError, match="pip install wandb"):
        check_loggers(["wandb"])


def test_what_cannot_start_is_a_sentence(folder):
    (folder / "tensorboard").write_text("in the way")
    with pytest.raises(UserError, match="loggers: tensorboard cannot start: ") as error:
        make_loggers(["tensorboard"], folder, CONFIG)
    assert "\n" not in str(error.value)


def test_a_logger_that_fails_is_told_once_and_switched_off():
    calls, told = [], []

    def send(numbers, step):
        calls.append(step)
        raise OSError("disk full\nand more")

    def finish():
        calls.append("close")
        raise OSError("again")

    logger = Logger("wandb", send, finish, told.append)
    for step in range(3):
        logger.log({"lam": 1.0}, step)
    logger.close()
    assert told == ["warning: no more metrics go to wandb: OSError: disk full"]
    assert calls == [0, "close"]


def test_a_failing_package_leaves_the_others_alone(folder, monkeypatch, capsys):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    (failing,), (working,) = (make_loggers(["tensorboard"], folder / name, CONFIG) for name in "ab")
    with monkeypatch.context() as patch:
        patch.setattr(writer, "add_scalar", lambda *_: 1 / 0)
        failing.log({"lam": 1.0}, 0)
    for logger in (failing, working):
        logger.log({"lam": 1.0}, 1)
        logger.close()
    assert (
        capsys.readouterr().out == "warning: no more metrics go to tensorboard: ZeroDivisionError: division by zero\n"
    )
    assert scalars(read_tensorboard(folder / "b"), "lam") == [(1, 1.0)]


def test_nothing_is_imported_until_it_is_asked_for():
    packages = "{'tensorboard', 'torch.utils.tensorboard', 'wandb', 'trackio'}"
    code = f"import sys, repo.runs.loggers as l; l.check_loggers([]); assert not {packages} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
