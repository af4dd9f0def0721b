"""Checkpoints: everything a run needs to go on, written aside, synced and renamed, with `latest` moved last.

RUN/checkpoints/step-000010/{model.safetensors, optimizer.pt, state.json}
RUN/checkpoints/latest       the name of the newest complete one
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class State:
    """step: steps done, hence the data cursor; penalty: its state; offsets: bytes of the append-only files."""

    step: int
    penalty: dict[str, Any]
    skipped_in_a_row: int
    offsets: dict[str, int]


def fsync_folder(folder: Path) -> None:
    """Make renames in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make a file's content durable."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Create the folder `target` with what `write` puts into it, or not at all."""
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        write(staging)
        for path in sorted(staging.rglob("*")):
            if path.is_file():
                fsync_file(path)
        fsync_folder(staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
        fsync_folder(target.parent)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"cannot write {target}: {error.strerror or error}; what was there before is intact") from error


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    staging = path.with_name(f".{path.name}.partial")
    staging.write_text(text, encoding="utf-8")
    fsync_file(staging)
    staging.replace(path)
    fsync_folder(path.parent)


def distinct_weights(model: Any) -> dict[str, Tensor]:
    """Parameters by name, tied ones once, detached."""
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}


def save(run: Path, state: State, model: Any, optimizer: torch.optim.Optimizer, keep: int = 1) -> Path:
    """Write a checkpoint, move `latest` to it, then drop all but the newest `keep`."""

    def write(folder: Path) -> None:
        save_file(distinct_weights(model), folder / "model.safetensors")
        torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / "optimizer.pt")
        (folder / "state.json").write_text(json.dumps(vars(state)), encoding="utf-8")

    root = run / "checkpoints"
    root.mkdir(exist_ok=True)
    target = root / f"step-{state.step:06d}"
    write_folder(target, write)
    write_text(root / "latest", target.name)
    for old in sorted(root.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest(run: Path) -> Path:
    """The newest complete checkpoint of a run. UserError when the folder is no run or has none."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"--resume: {run} is not a run folder (it has no config.yaml)")
    pointer = run / "checkpoints" / "latest"
    folder = pointer.parent / pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else None
    if folder is None or not (folder / "state.json").is_file():
        raise UserError(f"--resume: {run} has no complete checkpoint; start a new run")
    return folder


def read_state(folder: Path) -> State:
    """The state of a checkpoint."""
    return State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))


def restore(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Load weights, optimiser state and the random state of a checkpoint into place."""
    weights = load_file(folder / "model.safetensors")
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise UserError(f"{folder} belongs to another model: its parameters have other names")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
