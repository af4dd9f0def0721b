"""Command line of repo.train: its own switches, and the configuration that they and the overrides lead to."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from .common.errors import UserError
from .config.arguments import join_negative_numbers, user_path
from .config.parse import PRESETS, make_parser, parse_config, preset_names, require_run
from .config.renamed import new_name
from .config.schema import Config

EMBEDDED = "embedded"  # preset of the default run
OWN = ("--config", "--model.path", "--data.train")  # arguments that name a configuration, model or prompts
LOG_WIDTH = 140  # columns of output that goes to a file or pipe


def console_of(quiet: bool = False) -> Console:
    """Make the console that a command prints to. quiet: print nothing."""
    console = Console(soft_wrap=True, quiet=quiet)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


@dataclass(frozen=True)
class Switches:
    """Options of the command line that are not fields of the configuration.

    presets: names of the presets that the configuration starts from, in order.
    resume: folder of the run to continue, or None.
    allow_change: dotted fields that may differ from those the run began with.
    trust_remote_code: run Python code that comes with models.
    dry_run: print shapes, memory and batch arithmetic only.
    """

    presets: list[str]
    resume: Path | None
    allow_change: list[str]
    trust_remote_code: bool
    dry_run: bool


def read_command(argv: list[str], description: str) -> tuple[Switches, Config]:
    """Parse the command line of repo.train into its switches and the configuration.

    The configuration starts from the presets or the resumed run; then --config and dotted overrides apply, in order.
    With neither, and unless an argument of OWN names another configuration, model or prompts, it starts from EMBEDDED.

    argv: the arguments after the program's name.
    description: first text of --help.

    Raises UserError for input that cannot be parsed.
    """
    command = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    command.add_argument(
        "--preset",
        action="append",
        default=[],
        dest="presets",
        choices=preset_names(),
        metavar="NAME",
        help=f"start from one of {', '.join(preset_names())}, or from several in turn; without --preset, --config, "
        f"--model.path and --data.train from {EMBEDDED}",
    )
    command.add_argument("--resume", type=user_path, metavar="RUN", help="continue the run in this folder")
    command.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="FIELD",
        help="with --resume: let this field, or the content that it names, differ from what the run began with",
    )
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the named models; a configuration file cannot set this",
    )
    command.add_argument("--dry-run", action="store_true", help="print shapes, memory and batch arithmetic, then exit")
    try:
        flags, rest = command.parse_known_args(join_negative_numbers(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if not (flags.presets or flags.resume or any(argument.partition("=")[0] in OWN for argument in rest)):
        flags.presets = [EMBEDDED]
    starts = [PRESETS / f"{name}.yaml" for name in flags.presets]
    if flags.resume:
        require_run(flags.resume, "--resume")
        starts = [flags.resume / "config.yaml", *starts]
    rest = [*(f"--config={start}" for start in starts), *rest]
    flags.allow_change = [new_name(field) for field in flags.allow_change]
    return Switches(**vars(flags)), parse_config(make_parser("repo.train", description, command), rest)
