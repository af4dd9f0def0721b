"""Run folder: its files and its exported model. A folder is created once, and reused only to resume its run."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from ..common.distributed import ALONE, World
from ..common.errors import UserError
from ..common.files import create_folder, write_folder, write_text
from ..config.parse import to_yaml
from ..config.schema import Config
from ..models.policy import Policy, save_policy
from .checkpoint import State
from .fingerprints import FILE as INPUTS
from .json_lines import JsonLines, lock
from .loggers import Logger, make_loggers

EXECUTION = "execution.json"
APPENDED = ("metrics", "samples")
OF_A_START = {
    "config.yaml",
    "versions.json",
    EXECUTION,
    INPUTS,
    "metrics.jsonl",
    "samples.jsonl",
    "eval",
    "tensorboard",
    "wandb",
    "wandb.id",
    "trackio.id",
}
PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "numpy",
    "safetensors",
    "peft",
    "bitsandbytes",
    "flash-attn",
    "repo-rlhf",
)


class Run:
    """The folder of a run, open for writing: metrics, samples, evaluations, the final model and the loggers.

    RUN/{config.yaml, versions.json, execution.json, inputs.json, metrics.jsonl, samples.jsonl, checkpoints/, eval/,
    final/}

    All processes call its methods, and only the first one writes.

    folder: an existing run folder.
    config: the resolved configuration.
    world: the processes of the run.
    state: state of the checkpoint that a resumed run continues from; its files are cut back to it.
    resumed: the run is resumed; without a state, which means before its first checkpoint, its files are emptied.
    """

    def __init__(
        self, folder: Path, config: Config, world: World = ALONE, state: State | None = None, resumed: bool = False
    ) -> None:
        self.path, self.world = folder, world
        self.switches = ""  # command-line switches that resuming the run needs again
        self.loggers: list[Logger] = []
        self.files: dict[str, JsonLines] = {}
        if world.first:
            settings, first_step = dataclasses.asdict(config), state.step if state else 0
            self.loggers = make_loggers(config.loggers, folder, settings, first_step)
            offsets = state.offsets if state else dict.fromkeys(APPENDED, 0) if resumed else {}
            self.files = {name: JsonLines(path_of(folder, name), offsets.get(name)) for name in APPENDED}

    @property
    def offsets(self) -> dict[str, int]:
        """Sync the append-only files to disk and return their sizes in bytes, by name."""
        return {name: file.sync() for name, file in self.files.items()}

    @property
    def resume_command(self) -> str:
        """Return the command line that continues the run."""
        launch = "python"
        if self.world.size > 1:
            launch = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', self.world.size)}"
        return f"{launch} -m repo.train --resume {shlex.quote(str(self.path))}{self.switches}"

    def write(self, step: int, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """Write the metrics and samples of a step to the files, and the metrics to the configured loggers."""
        if not self.world.first:
            return
        self.files["metrics"].write(record)
        for sample in samples:
            self.files["samples"].write(sample)
        for logger in self.loggers:
            logger.log(record, step)

    def close(self) -> None:
        """Close the files and the loggers."""
        for file in self.files.values():
            file.close()
        for logger in self.loggers:
            logger.close()

    def write_evaluation(self, name: str, value: Any) -> None:
        """Write an evaluation to RUN/eval/<name>.json."""
        if self.world.first:
            (self.path / "eval").mkdir(exist_ok=True)
            text = json.dumps(value, indent=1, ensure_ascii=False)
            write_text(self.path / "eval" / f"{name}.json", text)

    def write_execution(self, lines: Iterable[str]) -> None:
        """Write to RUN/execution.json by which kernels and in which way this machine computes.

        lines: "what: how (why not faster)".
        """
        if self.world.first:
            ways = dict(line.split(": ", 1) for line in lines)
            write_text(self.path / EXECUTION, json.dumps(ways, indent=1, ensure_ascii=False))

    def read_evaluation(self, name: str) -> Any:
        """Read RUN/eval/<name>.json on the first process, for all of them; None if it is missing or damaged."""
        return self.world.from_first(lambda: read_json(self.path / "eval" / f"{name}.json"))

    def export(self, policy: Policy, card: str, weights: Iterable[tuple[str, Tensor]] | None = None) -> Path:
        """Write the policy in Hugging Face format to RUN/final/ and return that folder.

        card: text of its README.md, the model card.
        weights: the full weights of a sharded model, which all processes must gather together; None if not sharded.
        """
        final = self.path / "final"
        gathered = None
        if weights is not None:
            gathered = {name: w.cpu() for name, w in weights if self.world.first}
            gathered |= {name: b.cpu() for name, b in policy.model.state_dict().items() if not isinstance(b, DTensor)}

        def write(folder: Path) -> None:
            save_policy(policy, folder, gathered)
            (folder / "README.md").write_text(card, encoding="utf-8")

        if self.world.first:
            write_folder(final, write)
        return final


def path_of(folder: Path, name: str) -> Path:
    """Return the path of an append-only file of a run: metrics or samples."""
    return folder / f"{name}.jsonl"


def folder_of(config: Config) -> Path:
    """Choose the folder of a new run. Raises UserError if it exists, unless it is of a run without a step."""
    folder = Path(config.out or f"runs/{config.algorithm.method}-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists() and not is_unused(folder):
        raise UserError(f"--out: {folder} exists; choose another folder, or continue that run with --resume {folder}")
    return folder


def is_unused(folder: Path) -> bool:
    """Return whether a folder is of a run that has ended before its first step, so that a new run may replace it.

    It then holds only files of the start, and no process has it open.
    """
    metrics = path_of(folder, "metrics")
    if not metrics.is_file() or any(entry.name not in OF_A_START for entry in folder.iterdir()):
        return False
    if any(path_of(folder, name).stat().st_size for name in APPENDED if path_of(folder, name).exists()):
        return False
    with metrics.open("a") as file:
        return lock(file)


def create(config: Config, folder: Path, inputs: dict[str, str], world: World = ALONE) -> Run:
    """Create a run folder, completely or not at all.

    config: the resolved configuration, which the folder keeps.
    inputs: fingerprints of everything that the run reads from outside.

    Raises UserError if the folder cannot be made or a logger cannot start.
    """
    config = dataclasses.replace(config, out=str(folder))

    def write(staging: Path) -> None:
        (staging / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (staging / "versions.json").write_text(json.dumps(versions(), indent=1), encoding="utf-8")
        (staging / INPUTS).write_text(json.dumps(inputs, indent=1), encoding="utf-8")
        for name in APPENDED:
            path_of(staging, name).touch()

    if world.first:
        if is_unused(folder):
            shutil.rmtree(folder)
        create_folder(folder, write)
    try:
        return Run(folder, config, world)
    except UserError:  # a logger that cannot start
        shutil.rmtree(folder)
        raise


def read_json(path: Path) -> Any:
    """Read a JSON file; return None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, by name."""
    installed = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed
