"""The run folder: created once, never reused except to resume; its files and its exported model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from . import parsing
from .checkpoint import State, latest, read_state
from .config import Config, field_names
from .errors import UserError
from .files import write_folder, write_text
from .loggers import make_loggers
from .metrics import JsonLines
from .policy import Policy, save_policy

MAY_CHANGE_ON_RESUME = {"steps", "save_every", "sample_every", "loggers", "scoring.timeout", "optimizer.max_skipped"}
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
    """RUN/{config.yaml, versions.json, metrics.jsonl, samples.jsonl, checkpoints/, eval/, final/}."""

    def __init__(self, folder: Path, config: Config, state: State | None = None, resumed: bool = False) -> None:
        self.folder = folder
        offsets: dict[str, int] = state.offsets if state else {"metrics": 0, "samples": 0} if resumed else {}
        self.loggers = make_loggers(config.loggers, folder, dataclasses.asdict(config), state.step if state else 0)
        self.metrics = JsonLines(folder / "metrics.jsonl", offsets.get("metrics"))
        self.samples = JsonLines(folder / "samples.jsonl", offsets.get("samples"))

    @property
    def offsets(self) -> dict[str, int]:
        """Synced sizes of the append-only files."""
        return {"metrics": self.metrics.sync(), "samples": self.samples.sync()}

    @property
    def resume_command(self) -> str:
        """What the user types to go on."""
        return f"python -m repo.train --resume {self.folder}"

    def write(self, step: int, record: dict[str, Any], samples: list[dict[str, Any]]) -> None:
        """A step's lines, in the files and in the configured loggers."""
        self.metrics.write(record)
        for sample in samples:
            self.samples.write(sample)
        for logger in self.loggers:
            logger.log(record, step)

    def close(self) -> None:
        """Let the loggers finish."""
        for logger in self.loggers:
            logger.close()

    def write_evaluation(self, name: str, value: Any) -> None:
        """RUN/eval/<name>.json."""
        (self.folder / "eval").mkdir(exist_ok=True)
        write_text(self.folder / "eval" / f"{name}.json", json.dumps(value, indent=1, ensure_ascii=False))

    def read_evaluation(self, name: str) -> Any:
        """What write_evaluation wrote, or None."""
        path = self.folder / "eval" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def export(self, policy: Policy, card: str) -> Path:
        """RUN/final/: the policy in Hugging Face format with a model card."""

        def write(folder: Path) -> None:
            save_policy(policy, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")

        write_folder(self.folder / "final", write)
        return self.folder / "final"


def folder_of(config: Config) -> Path:
    """Where a new run goes. UserError when that exists."""
    folder = Path(config.out or f"runs/{config.algorithm.method}-{datetime.now():%Y%m%d-%H%M%S}")
    if folder.exists():
        raise UserError(
            f"--out: {folder} exists; choose another folder, or continue that run with --resume {folder}"
        ) from None
    return folder


def create(config: Config, folder: Path) -> Run:
    """A new run folder with the resolved configuration. UserError when it cannot be made."""
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out: cannot create {folder}: {error.strerror}") from None
    config = dataclasses.replace(config, out=str(folder))
    write_text(folder / "config.yaml", parsing.to_yaml(config))
    write_text(folder / "versions.json", json.dumps(versions(), indent=1))
    try:
        return Run(folder, config)
    except UserError:  # a logger that cannot start
        shutil.rmtree(folder)
        raise


def check_resume(folder: Path, config: Config) -> tuple[State | None, Path | None]:
    """State and checkpoint of the run to resume, both None before the first one; nothing is changed.

    UserError when there is nothing left to do, or a field differs from the saved one that would change
    the steps already done.
    """
    checkpoint = latest(folder)
    saved = parsing.load(folder / "config.yaml")
    names = field_names()
    changed = [k for k in names if _get(saved, k) != _get(config, k) and k not in MAY_CHANGE_ON_RESUME]
    if changed:
        k = changed[0]
        raise UserError(f"--resume: {k} was {_get(saved, k)!r} in this run and cannot become {_get(config, k)!r}")
    state = read_state(checkpoint) if checkpoint else None
    done = state.step if state else 0
    if done > config.steps or (done == config.steps and (folder / "final").exists()):
        raise UserError(f"--resume: the run already has {done} steps; ask for more with --steps")
    return state, checkpoint


def reopen(folder: Path, config: Config, state: State | None) -> Run:
    """The run, with its files cut back to the checkpoint and without what a longer run makes stale."""
    run = Run(folder, config, state, resumed=True)  # first, since a logger that cannot start must not lose anything
    (folder / "eval" / "after.json").unlink(missing_ok=True)
    shutil.rmtree(folder / "final", ignore_errors=True)
    write_text(folder / "config.yaml", parsing.to_yaml(config))
    return run


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
