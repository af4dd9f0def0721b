"""The run folder: created once, never reused except to resume; its files, its signals, its exported model."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import signal
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from . import config as configuration
from .checkpoint import State, latest, read_state, write_folder, write_text
from .config import Config
from .errors import UserError
from .metrics import JsonLines
from .policy import Policy, save_policy

MAY_CHANGE_ON_RESUME = {"steps", "save_every", "sample_every"}
PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors", "repo-rlhf")


class Run:
    """RUN/{config.yaml, versions.json, metrics.jsonl, samples.jsonl, checkpoints/, eval/, final/}."""

    def __init__(self, folder: Path, offsets: dict[str, int] | None = None) -> None:
        self.folder = folder
        offsets = offsets or {}
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

    def write_json(self, name: str, value: Any) -> None:
        """RUN/eval/<name>.json."""
        (self.folder / "eval").mkdir(exist_ok=True)
        write_text(self.folder / "eval" / f"{name}.json", json.dumps(value, indent=1, ensure_ascii=False))

    def read_json(self, name: str) -> Any:
        """What write_json wrote, or None."""
        path = self.folder / "eval" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def export(self, policy: Policy, card: str) -> Path:
        """RUN/final/: the policy in Hugging Face format with a model card."""

        def write(folder: Path) -> None:
            save_policy(policy, folder)
            (folder / "README.md").write_text(card, encoding="utf-8")

        write_folder(self.folder / "final", write)
        return self.folder / "final"


def create(config: Config) -> tuple[Run, Config]:
    """A new run folder with the resolved configuration. UserError when it exists."""
    name = config.out or f"runs/{config.algorithm.method}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(name)
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"--out: {folder} exists; choose another folder, or continue that run with --resume {folder}"
        ) from None
    except OSError as error:
        raise UserError(f"--out: cannot create {folder}: {error.strerror}") from None
    config = dataclasses.replace(config, out=str(folder))
    write_text(folder / "config.yaml", configuration.to_yaml(config))
    write_text(folder / "versions.json", json.dumps(versions(), indent=1))
    return Run(folder), config


def reopen(folder: Path, config: Config) -> tuple[Run, State, Path]:
    """The run to resume, its state and its checkpoint; files are cut back to where the checkpoint was taken.

    UserError when a field other than steps, save_every or sample_every differs from the saved configuration.
    """
    checkpoint = latest(folder)
    saved = configuration.load(folder / "config.yaml")
    changed = [
        k for k in configuration.field_names() if _get(saved, k) != _get(config, k) and k not in MAY_CHANGE_ON_RESUME
    ]
    if changed:
        k = changed[0]
        raise UserError(f"--resume: {k} was {_get(saved, k)!r} in this run and cannot become {_get(config, k)!r}")
    state = read_state(checkpoint)
    if state.step >= config.steps:
        raise UserError(f"--resume: the run already has {state.step} steps; ask for more with --steps")
    write_text(folder / "config.yaml", configuration.to_yaml(config))
    return Run(folder, state.offsets), state, checkpoint


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


class StopRequest:
    """Set by the first SIGINT or SIGTERM; the loop stops at its next safe point. A second one ends the process."""

    def __init__(self) -> None:
        self.requested = False
        self.previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.restore()

    def restore(self) -> None:
        """Put the previous handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def model_card(config: Config, steps: int, table: list[tuple[str, str, str, str]]) -> str:
    """A model card in Markdown: what was trained, how, and what the held-out evaluation measured."""
    algorithm = config.algorithm
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [rlhf, safe-rlhf, repo]",
        "---",
        "",
        "# Policy aligned with RePO's training loop",
        "",
        f"Base model: `{config.model.path}`. Method: `{algorithm.method}`"
        + (f", mode `{algorithm.mode}`" if algorithm.method == "repo" else "")
        + f"; cost limit {algorithm.cost_limit}, beta {algorithm.beta}, {steps} steps, seed {config.seed}.",
        f"Reward: `{config.scoring.reward}`. Cost: `{config.scoring.cost}`.",
        "",
    ]
    if table:
        lines += [
            "Held-out prompts, mean [95 % bootstrap interval over prompts]:",
            "",
            "| | before | after | change |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    lines.append("Scores are those of the scorers named above; no claim is made beyond them.")
    return "\n".join(lines) + "\n"
