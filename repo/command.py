"""Command: the switches of repo.train that are no configuration, and the configuration that they lead to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .common.errors import UserError
from .config.parse import PRESETS, make_parser, parse_config, preset_names
from .config.renamed import new_name
from .config.schema import Config
from .runs.folder import require_run

LOG_WIDTH = 140  # columns of a console that is not a terminal


def console_of(quiet: bool = False) -> Console:
    """Where a command prints."""
    console = Console(soft_wrap=True, quiet=quiet)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


@dataclass(frozen=True)
class Switches:
    """preset: name or None; resume: run folder or None; allow_change: fields that may differ from what the run began
    with; trust_remote_code: run Python code that comes with models; dry_run: print arithmetic only."""

    preset: str | None
    resume: Path | None
    allow_change: list[str]
    trust_remote_code: bool
    dry_run: bool


def read_command(argv: list[str], description: str) -> tuple[Switches, Config]:
    """The command's own switches and the configuration behind them: preset, then --config, then overrides.

    description: what --help begins with. UserError on bad input.
    """
    command = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    command.add_argument("--preset", choices=preset_names(), help="start from one of repo/config/presets")
    command.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this folder")
    command.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="with --resume: this field, or what it names, may differ from what the run began with",
    )
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the models named; never read from a file",
    )
    command.add_argument("--dry-run", action="store_true", help="print shapes, memory and batch arithmetic, then exit")
    try:
        flags, rest = command.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if flags.preset:
        rest = ["--config", str(PRESETS / f"{flags.preset}.yaml"), *rest]
    if flags.resume:
        require_run(flags.resume)
        rest = ["--config", str(flags.resume / "config.yaml"), *rest]
    flags.allow_change = [new_name(field) for field in flags.allow_change]
    return Switches(**vars(flags)), parse_config(make_parser("repo.train", description, command), rest)
