"""Checkpoints: everything that a run needs to continue.

RUN/checkpoints/step-000010/{state.safetensors, state.json, manifest.json}
RUN/checkpoints/latest       the name of the newest checkpoint
RUN/checkpoints/best         the name of the best checkpoint that is kept

A checkpoint is written to a temporary folder, synced to disk and renamed. Then `best` changes, then `latest`; only then
are old checkpoints removed. A crash at any moment therefore leaves a whole checkpoint to continue from.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.distributed import ALONE, World
from ..common.errors import UserError, first_line
from ..common.files import checksum_of, partial_of, write_folder, write_text
from ..common.seeds import random_state, set_random_state
from ..models.credit import Credit
from . import state_files

NAME = re.compile(r"step-\d{6,}")  # names that `latest` and `best` may hold: no path out of the folder
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class State:
    """State of a run besides its tensors.

    step: number of steps done, which also gives the position in the training prompts.
    penalty: state of the multipliers.
    skipped_in_a_row: optimiser steps just before that were left out because they were not finite.
    offsets: bytes of each append-only file that belong to the steps done.
    safe_rate, reward: means over the steps since the previous checkpoint that sampled the policy; NaN if none did.
    random: states of the global random generators, one for each process.
    gate: state of the gate; {} without one.
    """

    step: int
    penalty: dict[str, Any]
    skipped_in_a_row: int
    offsets: dict[str, int]
    safe_rate: float
    reward: float
    random: list[dict[str, Any]]
    gate: dict[str, Any] = field(default_factory=dict)  # which checkpoints of earlier versions do not have


def make_state(
    step: int,
    penalty: dict[str, Any],
    skipped: int,
    offsets: dict[str, int],
    records: Sequence[dict[str, Any]],
    world: World = ALONE,
    gate: dict[str, Any] | None = None,
) -> State:
    """Make the state after `step` steps; all processes must call it together.

    penalty, skipped, offsets, gate: as in State. records: metrics of the steps since the previous checkpoint.
    """
    sampled = [r for r in records if math.isfinite(r["safe_rate"])]
    safe_rate, reward = (
        sum(r[key] for r in sampled) / len(sampled) if sampled else math.nan for key in ("safe_rate", "reward_mean")
    )
    return State(step, penalty, skipped, offsets, safe_rate, reward, world.gather(random_state()), gate or {})


class Saver:
    """Writes the checkpoints of a run in the background.

    Weights and moments do not change between two updates, so they are written without a copy, and the next update must
    `wait` until the file is on disk.

    run: the run folder.
    keep: number of newest checkpoints to keep. The best stays too: the one with the highest reward among those whose
        safe rate reaches `safety_target`, or the safest if none does; with a gate among those that it accepted.
    safety_target: safe rate in [0, 1].
    world: the processes of the run.
    sharded: each process holds a part of the weights.
    """

    def __init__(self, run: Path, keep: int, safety_target: float, world: World, sharded: bool) -> None:
        self.root, self.keep, self.safety_target, self.world = run / "checkpoints", keep, safety_target, world
        self.sharded = sharded
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish the checkpoint being written, also after an error of the loop, but not after a second interrupt."""
        if self.thread is not None and (kind is None or issubclass(kind, Exception)):
            self.thread.join()

    def start(
        self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer, credit: Credit | None = None
    ) -> None:
        """Begin to write a checkpoint; all processes must call it together. credit: its head, if the run learns one.

        A sharded run writes in the foreground, each process its own part.
        """
        self.wait()
        tensors, numbers = state_files.collect(model, optimizer, credit)
        if self.sharded:
            self._write_shards(state, tensors, numbers)
        elif self.world.first:
            # copy from the GPU now: a copy during the next rollout would break its recording of a CUDA graph
            work = state, {name: t.cpu() for name, t in tensors.items()}, numbers
            # a daemon thread, so that a second interrupt ends the process at once
            self.thread = threading.Thread(target=self._write_aside, args=work, name="checkpoint", daemon=True)
            self.thread.start()

    def wait(self) -> None:
        """Block until the checkpoint is whole and on disk. Raises the error of the writing, if there was one."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _write_aside(self, state: State, tensors: dict[str, Any], numbers: state_files.Numbers) -> None:
        try:
            self._publish(state, numbers, lambda folder: state_files.write(folder, tensors))
        except BaseException as error:  # `wait` raises it in the main thread
            self.error = error

    def _write_shards(self, state: State, tensors: dict[str, Any], numbers: state_files.Numbers) -> None:
        world, staging = self.world, partial_of(self.root / _name(state.step))

        def write(folder: Path) -> dict[str, int]:
            world.barrier()  # the first process has made the folder
            state_files.write_shards(folder, tensors)
            world.barrier()  # every process has written its file
            return {}

        if world.first:
            self._publish(state, numbers, write)
        else:
            write(staging)
        world.barrier()

    def _publish(
        self, state: State, numbers: state_files.Numbers, write_tensors: Callable[[Path], dict[str, int]]
    ) -> None:
        """Write the folder, then `best`, then `latest`, and remove old checkpoints last: no crash loses a checkpoint.

        write_tensors: fills a folder and returns the CRC-32 of the files whose checksum it knows, by name.
        """

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
        if state.gate and state.gate["accepted"] != state.step:
            return False  # the gate may still take this policy back
        best = pointed(self.root / "best")
        if best is None:
            return True
        try:
            before, _ = read_state(best)
        except UserError:
            return True
        if state.gate and before.gate.get("accepted") != before.step:  # it is from a time without the gate
            return True
        if math.isnan(before.safe_rate):  # nothing is known of it: the newest one stays until something is
            return True
        return before.step >= state.step or self._merit(state) > self._merit(before)

    def _merit(self, state: State) -> tuple[bool, float]:
        if math.isnan(state.safe_rate):
            return False, -math.inf
        safe = state.safe_rate >= self.safety_target
        return safe, state.reward if safe else state.safe_rate

    def _prune(self, step: int) -> None:
        """Remove all checkpoints but the newest `keep`, the best, and those that the gate of a kept one may go back to.

        Checkpoints of later steps go too: the run continued from an earlier one, so they are not part of it any more.
        """
        folders = steps_of(self.root)
        kept = [s for s in sorted(folders) if s <= step][-self.keep :]
        best = pointed(self.root / "best")
        whole = [*(folders[s] for s in kept), *([best] if best else [])]
        kept += [s for s in map(accepted_in, whole) if s is not None]
        stale = [folder for number, folder in folders.items() if number not in kept and folder != best]
        for left_over in (*stale, *self.root.glob(".*")):  # hidden files are left by a save that was interrupted
            if left_over.is_dir():
                shutil.rmtree(left_over, ignore_errors=True)
            else:
                with suppress(OSError):
                    left_over.unlink()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def steps_of(root: Path) -> dict[int, Path]:
    """List the checkpoint folders in `root` by step, intact or not."""
    return {int(p.name.removeprefix("step-")): p for p in root.glob("step-*") if NAME.fullmatch(p.name)}


def pointed(pointer: Path) -> Path | None:
    """Return the folder that the file `latest` or `best` names; None if there is no such folder."""
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    folder = pointer.parent / name
    return folder if NAME.fullmatch(name) and folder.is_dir() else None


def make_manifest(folder: Path, known: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Compute the size and CRC-32 of every file in a folder, by name. known: checksums that need no reading."""
    paths = sorted(folder.iterdir())
    return {p.name: {"bytes": p.stat().st_size, "crc32": known.get(p.name) or checksum_of(p)} for p in paths}


def fault_of(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if every byte is as it was written."""
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
    """Find the checkpoint to continue from: the one that `latest` names, or the newest one that is intact.

    Returns (its folder, a sentence for each damaged checkpoint passed over); the folder is None if there is none yet.
    Raises UserError if there are checkpoints but none is intact.
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
    """Read the state of a checkpoint and the optimiser's plain numbers. Raises UserError if it cannot be read."""
    try:
        content = json.loads((folder / STATE).read_text(encoding="utf-8"))
        numbers = content.pop("numbers")
        return State(**content), numbers
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder / STATE} is not a state that this version can read: {first_line(error)}") from None


def accepted_in(folder: Path) -> int | None:
    """Return the step that the gate of a checkpoint would go back to; None without a gate, or if it cannot be read."""
    with suppress(UserError):
        return read_state(folder)[0].gate.get("accepted")
    return None


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World = ALONE,
    credit: Credit | None = None,
) -> None:
    """Load a checkpoint's weights, optimiser state, learned credit and random state into what holds them.

    Every process takes the random state of the first if the number of processes has changed.
    Raises UserError if the checkpoint cannot be read or belongs to another model.
    """
    state, numbers = read_state(folder)
    state_files.restore(folder, numbers, model, optimizer, credit)
    set_random_state(state.random[world.rank if len(state.random) == world.size else 0])


def find_step(run: Path, step: int) -> Path:
    """Find the checkpoint after `step` steps, to which a gate goes back.

    Raises UserError if it is missing or damaged.
    """
    folder = run / "checkpoints" / _name(step)
    if not folder.is_dir():
        raise UserError(f"gate: {folder}, the last accepted policy, is missing, so that the run cannot go back to it")
    if fault := fault_of(folder):
        raise UserError(f"gate: {folder}, the last accepted policy, is not intact: {fault}")
    return folder


def find_named(run: Path, name: str) -> Path:
    """Find a checkpoint by `best`, `latest` or its folder's name. Raises UserError if it is missing or damaged."""
    root = run / "checkpoints"
    known = {p.name: p for p in steps_of(root).values()}
    folder = pointed(root / name) if name in ("best", "latest") else known.get(name)
    if folder is None:
        there = ", ".join(sorted(known)) or "no checkpoint"
        raise UserError(f"--checkpoint: {run} has no {name!r}; it has {there}")
    if fault := fault_of(folder):
        raise UserError(f"--checkpoint: {folder} is not intact: {fault}")
    return folder
