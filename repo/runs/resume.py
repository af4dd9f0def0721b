"""Resume: decide whether and where a run continues, and check that its inputs are those it began with."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.distributed import ALONE, World
from ..common.errors import UserError
from ..common.files import write_text
from ..config.fields import field_names
from ..config.parse import load_config, to_yaml
from ..config.schema import Config
from . import checkpoint as checkpoints
from .checkpoint import State
from .fingerprints import FILE as INPUTS
from .fingerprints import changed
from .folder import Run, path_of, read_json, versions

MAY_CHANGE_ON_RESUME = {
    "steps",
    "save_every",
    "keep",
    "safety_target",
    "sample_every",
    "loggers",
    "model.shard",
    "rollout.vllm_python",
    "scoring.timeout",
    "optimizer.max_skipped",
}


@dataclass(frozen=True)
class Resumed:
    """The point that a run continues from.

    state: state of its checkpoint.
    checkpoint: folder of the checkpoint. Both are None if there is no checkpoint yet.
    warnings: sentences about what differs from when the run began.
    """

    state: State | None
    checkpoint: Path | None
    warnings: list[str]


def check_resume(folder: Path, config: Config, allowed: Sequence[str] = ()) -> Resumed:
    """Find the point that the run in `folder` continues from. No file is changed.

    config: the configuration to continue with.
    allowed: fields that may differ from the saved ones although this changes what the remaining steps do.

    Raises UserError if all steps are done, no checkpoint is intact, a file is shorter than its checkpoint says, or a
    field differs that may not.
    """
    names = field_names()
    if unknown := [name for name in allowed if name not in names]:
        raise UserError(f"--allow-change takes fields of the configuration; got {unknown[0]!r}")
    checkpoint, warnings = checkpoints.find(folder)
    saved = load_config(folder / "config.yaml")
    for k in (k for k in names if _get(saved, k) != _get(config, k) and k not in MAY_CHANGE_ON_RESUME):
        change = f"{k} was {_get(saved, k)!r} in this run"
        if k not in allowed:
            way = f"unless --allow-change {k} is given"
            raise UserError(f"--resume: {change} and cannot become {_get(config, k)!r} {way}")
        warnings.append(f"{change} and is now {_get(config, k)!r}")
    schedule = config.optimizer.schedule
    if config.steps != saved.steps and schedule != "constant":
        warnings.append(
            f"steps was {saved.steps}: with optimizer.schedule {schedule} the learning rate of further steps changes"
        )
    before = read_json(folder / "versions.json") or {}
    newer = [f"{name} {before[name]} -> {v}" for name, v in versions().items() if before.get(name, v) != v]
    if newer:
        warnings.append(f"the run began with other versions, so results may not be bit-identical: {', '.join(newer)}")
    state = checkpoints.read_state(checkpoint)[0] if checkpoint else None
    done = state.step if state else 0
    if done > config.steps or (done == config.steps and (folder / "final").exists()):
        raise UserError(f"--resume: the run already has {done} steps; ask for more with --steps")
    gate = saved.gate.every
    if gate and done == saved.steps < config.steps and done % gate:
        warnings.append(
            f"the gate decided after step {done}, the last one then; a run of {config.steps} steps from the beginning "
            "would not have decided there"
        )
    for name, offset in (state.offsets if state else {}).items():
        path = path_of(folder, name)
        size = path.stat().st_size if path.is_file() else 0
        if size < offset:
            raise UserError(
                f"--resume: {path} has {size} bytes, {offset} when the checkpoint was written; was it edited?"
            )
    return Resumed(state, checkpoint, warnings)


def check_inputs(folder: Path, inputs: dict[str, str], allowed: Sequence[str] = ()) -> list[str]:
    """Return warnings about models, prompts and scorers that differ from those the run began with.

    inputs: their fingerprints now. allowed: fields whose input may differ. Raises UserError if another input differs.
    """
    warnings = []
    for name in changed(read_json(folder / INPUTS) or {}, inputs):
        if name not in allowed:
            raise UserError(
                f"--resume: the input named by {name} has changed since the run began; restore what was there, or "
                f"continue with --allow-change {name}"
            )
        warnings.append(f"the input named by {name} has changed since the run began")
    return warnings


def reopen(folder: Path, config: Config, state: State | None, inputs: dict[str, str], world: World = ALONE) -> Run:
    """Open a run folder to continue the run.

    Its files are cut back to the checkpoint, and evaluations and the final model of later weights are removed. The
    configuration, versions and fingerprints are written anew, so that allowed changes last.

    state: state of the checkpoint to continue from; None to begin again. inputs: fingerprints now.
    """
    # first: if a logger cannot start, nothing must have been removed yet
    run = Run(folder, config, world, state, resumed=True)
    if world.first:
        _remove_stale_evaluations(folder, state.step if state else 0)
        shutil.rmtree(folder / "final", ignore_errors=True)
        write_text(folder / "config.yaml", to_yaml(config))
        write_text(folder / "versions.json", json.dumps(versions(), indent=1))
        write_text(folder / INPUTS, json.dumps(inputs, indent=1))
    return run


def _remove_stale_evaluations(folder: Path, step: int) -> None:
    """Remove evaluations of policies that no longer exist when the run continues from `step`."""
    for path in (folder / "eval").glob("*.json"):
        name = re.sub(r"^shield\d+-", "", path.stem)  # of an evaluation behind a shield
        checkpoint = name.removeprefix("step-")
        if name in ("after", "final") or (checkpoint != name and checkpoint.isdigit() and int(checkpoint) > step):
            path.unlink()


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value
