"""Checkpoints: everything a run needs to go on, written aside, synced and renamed, with `latest` moved last.

RUN/checkpoints/step-000010/{state.safetensors, state.json, manifest.json}
RUN/checkpoints/latest       the name of the newest
RUN/checkpoints/best         the name of the best that is kept
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.distributed import ALONE, World
from ..common.errors import UserError, first_line
from ..common.files import checksum_of, partial_of, write_folder, write_text
from ..common.seeds import random_state, set_random_state
from . import state_files

NAME = re.compile(r"step-\d{6,}")  # what `latest` and `best` may say: a folder beside them
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class State:
    """step: steps done, hence the data cursor; penalty: its state; offsets: bytes of the append-only files; safe_rate,
    reward: means over the steps since the checkpoint before; random: states of each process's global generators."""

    step: int
    penalty: dict[str, Any]
    skipped_in_a_row: int
    offsets: dict[str, int]
    safe_rate: float
    reward: float
    random: list[dict[str, Any]]


def make_state(
    step: int,
    penalty: dict[str, Any],
    skipped: int,
    offsets: dict[str, int],
    records: Sequence[dict[str, Any]],
    world: World = ALONE,
) -> State:
    """The state after `step` steps, which every process asks for. records: the metrics since the checkpoint before, at
    least one."""
    safe_rate, reward = (sum(r[key] for r in records) / len(records) for key in ("safe_rate", "reward_mean"))
    return State(step, penalty, skipped, offsets, safe_rate, reward, world.gather(random_state()))


class Saver:
    """Writes the checkpoints of a run, in the background: weights and moments rest from the end of one update to the
    next, so that they are written from where they are, and the next update waits for the writing to end.

    Besides the newest `keep` the best stays: the highest reward among those whose safe rate reaches `safety_target`,
    else the safest.
    """

    def __init__(self, run: Path, keep: int, safety_target: float, world: World, sharded: bool) -> None:
        self.root, self.keep, self.safety_target, self.world = run / "checkpoints", keep, safety_target, world
        self.sharded = sharded
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """An error of the loop does not cost the checkpoint that is being written; a second interrupt does."""
        if self.thread is not None and (kind is None or issubclass(kind, Exception)):
            self.thread.join()

    def start(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Begin to write; every process calls it. A sharded run writes in the foreground, all processes together."""
        self.wait()
        tensors, numbers = state_files.collect(model, optimizer)
        if self.sharded:
            self._write_shards(state, tensors, numbers)
        elif self.world.first:
            # copies from a GPU beside the rollout would spoil the graph that it records
            work = state, {name: t.cpu() for name, t in tensors.items()}, numbers
            # a daemon: a second interrupt must end the process at once
            self.thread = threading.Thread(target=self._write_aside, args=work, name="checkpoint", daemon=True)
            self.thread.start()

    def wait(self) -> None:
        """Return when the checkpoint is whole and on disk. UserError when it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write_aside(self, state: State, tensors: dict[str, Any], numbers: state_files.Numbers) -> None:
        try:
            self._publish(state, numbers, lambda folder: state_files.write(folder, tensors))
        except BaseException as error:  # it belongs to whoever waits
            self.error = error

    def _write_shards(self, state: State, tensors: dict[str, Any], numbers: state_files.Numbers) -> None:
        world, staging = self.world, partial_of(self.root / _name(state.step))

        def write(folder: Path) -> dict[str, int]:
            world.barrier()  # the folder is there
            state_files.write_shards(folder, tensors)
            world.barrier()  # and so is everything in it
            return {}

        if world.first:
            self._publish(state, numbers, write)
        else:
            write(staging)
        world.barrier()

    def _publish(
        self, state: State, numbers: state_files.Numbers, write_tensors: Callable[[Path], dict[str, int]]
    ) -> None:
        """The protocol: the folder, then `best`, then `latest`, then what is no longer kept goes."""

        def write(folder: Path) -> None:
            checksums = write_tensors(folder)
            text = json.dumps(asdict(state) | {"numbers": numbers})
            (folder / STATE).write_text(text, encoding="utf-8")
            (folder / MANIFEST).write_text(json.dumps(make_manifest(folder, checksums), indent=1), encoding="utf-8")

        name = _name(state.step)
        write_folder(self.root / name, write)
        if self._is_best(state):
            write_text(self.root / "best", name)
        write_text(self.root / "latest", name)
        self._prune(state.step)

    def _is_best(self, state: State) -> bool:
        best = pointed(self.root / "best")
        if best is None:
            return True
        try:
            before, _ = read_state(best)
        except UserError:
            return True
        return before.step >= state.step or self._merit(state) > self._merit(before)

    def _merit(self, state: State) -> tuple[bool, float]:
        safe = state.safe_rate >= self.safety_target
        return safe, state.reward if safe else state.safe_rate

    def _prune(self, step: int) -> None:
        """Keep the newest and the best. What is of later steps belongs to a future that this run gave up."""
        folders = steps_of(self.root)
        kept = [s for s in sorted(folders) if s <= step][-self.keep :]
        best = pointed(self.root / "best")
        stale = [folder for number, folder in folders.items() if number not in kept and folder != best]
        for left_over in (*stale, *self.root.glob(".*")):  # the latter of a save that died
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                with suppress(OSError):
                    left_over.unlink()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def steps_of(root: Path) -> dict[int, Path]:
    """The checkpoint folders by step, intact or not."""
    return {int(p.name.removeprefix("step-")): p for p in root.glob("step-*") if NAME.fullmatch(p.name)}


def pointed(pointer: Path) -> Path | None:
    """The folder that `latest` or `best` names, None where it names none that is there."""
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = pointer.parent / name
    return folder if NAME.fullmatch(name) and folder.is_dir() else None


def make_manifest(folder: Path, known: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Size and CRC-32 of every file in a folder, by name. known: checksums of those that need not be read again."""
    paths = sorted(folder.iterdir())
    return {p.name: {"bytes": p.stat().st_size, "crc32": known.get(p.name) or checksum_of(p)} for p in paths}


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when every byte is what was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {p.name for p in folder.iterdir()} - {MANIFEST}
        if files != manifest.keys() or STATE not in files:
            return f"its files are not those of its {MANIFEST}"
        for name, entry in manifest.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {entry['bytes']}"
            if checksum_of(path) != entry["crc32"]:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"it cannot be read: {first_line(error)}"
    return None


def find(run: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None before the first, and a sentence for each that is left out.

    That is the one `latest` names, or where it is not intact, the newest that is. UserError when
    there are some and none is intact.
    """
    root = run / "checkpoints"
    newest_first = [folder for _, folder in sorted(steps_of(root).items(), reverse=True)]
    latest = pointed(root / "latest")
    order = ([latest] if latest else []) + [folder for folder in newest_first if folder != latest]
    left_out: list[str] = []
    for folder in order:
        fault = fault_of(folder)
        if fault is None:
            return folder, left_out
        left_out.append(f"{folder} is left out: {fault}")
    if left_out:
        raise UserError(f"--resume: no checkpoint of {run} is intact, and nothing was changed; {'; '.join(left_out)}")
    return None, []


def read_state(folder: Path) -> tuple[State, state_files.Numbers]:
    """The state of a checkpoint, and the optimiser's plain numbers. UserError when it is not one of this version."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        numbers = content.pop("numbers")
        return State(**content), numbers
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / STATE} is no state of this version: {first_line(error)}") from None


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World = ALONE) -> None:
    """Load weights, optimiser state and the random state of a checkpoint into place; the random state of the first
    process, where there are more or fewer than there were."""
    state, numbers = read_state(folder)
    state_files.restore(folder, numbers, model, optimizer)
    set_random_state(state.random[world.rank if len(state.random) == world.size else 0])


def find_named(run: Path, name: str) -> Path:
    """Find the checkpoint that `best`, `latest` or a folder's name means. Raises UserError where it is not intact."""
    root = run / "checkpoints"
    known = {p.name: p for p in steps_of(root).values()}
    folder = pointed(root / name) if name in ("best", "latest") else known.get(name)
    if folder is None:
        there = ", ".join(sorted(known)) or "no checkpoint"
        raise UserError(f"--checkpoint: {run} has no {name!r}; it has {there}")
    if fault := fault_of(folder):
        raise UserError(f"--checkpoint: {folder} is not intact: {fault}")
    return folder
