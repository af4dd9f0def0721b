"""Export a checkpoint of a run as a model in Hugging Face format.

python -m repo.export runs/mine                          the best checkpoint
python -m repo.export runs/mine --checkpoint latest      the newest, or step-000010
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from . import assets
from .common.errors import UserError, exit_with_sentence
from .common.files import write_folder
from .config import parse as parsing
from .config.schema import Config
from .models.actor import Actor
from .models.policy import Policy, load_policy, save_policy
from .runs import checkpoint, state_files
from .runs import folder as run
from .runs.model_card import model_card
from .scoring.scorers import EMBEDDED
from .setup import model_path


def chosen(folder: Path, name: str) -> Path:
    """The checkpoint that `best`, `latest` or a folder's name means. UserError when it is not there or not intact."""
    root = folder / "checkpoints"
    known = {p.name: p for p in checkpoint.steps_of(root).values()}
    found = checkpoint.pointed(root / name) if name in ("best", "latest") else known.get(name)
    if found is None:
        there = ", ".join(sorted(known)) or "no checkpoint"
        raise UserError(f"--checkpoint: {folder} has no {name!r}; it has {there}")
    if fault := checkpoint.fault_of(found):
        raise UserError(f"--checkpoint: {found} is not intact: {fault}")
    return found


def policy_of(source: Path, config: Config, device: torch.device, trust: bool) -> Policy:
    """The policy of a checkpoint folder; config: of its run."""
    path = model_path(config, assets.ensure() if config.model.path == EMBEDDED else None)
    policy = load_policy(path, device, True, config.model, trust)
    state_files.restore_weights(source, Actor(policy))
    return policy


def export(folder: Path, name: str, out: Path | None, trust: bool) -> Path:
    """Write the policy of a checkpoint to `out` (default: RUN/export-<checkpoint>), which must not exist."""
    run.require_run(folder)
    config, source = parsing.load(folder / "config.yaml"), chosen(folder, name)
    target = out or folder / f"export-{source.name}"
    if target.exists():
        raise UserError(f"--out: {target} exists; choose another folder")
    policy = policy_of(source, config, torch.device("cpu"), trust)
    steps = checkpoint.read_state(source)[0].step

    def write(staging: Path) -> None:
        save_policy(policy, staging)
        (staging / "README.md").write_text(model_card(config, steps, []), encoding="utf-8")

    write_folder(target, write)
    return target


def run_command(argv: list[str] | None = None) -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(
        prog="repo.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--checkpoint", default="best", metavar="NAME", help="best (default), latest or step-000010")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to; default: RUN/export-<checkpoint>")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
    options = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    print(f"model: {export(options.run, options.checkpoint, options.out, options.trust_remote_code)}")


def main() -> None:
    """Console script."""
    exit_with_sentence(run_command)


if __name__ == "__main__":
    main()
