"""Parse YAML files, presets and dotted overrides into a checked Config; report mistakes in one sentence."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from ..common.errors import UserError, warn_user
from .arguments import expand_user, join_negative_numbers, require_values, wrap_scalars
from .check import check
from .explain import explain
from .renamed import rename_arguments
from .schema import Config

PRESETS = Path(__file__).parent / "presets"

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def preset_names() -> list[str]:
    """List the names of the configurations that come with the package, sorted."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def to_yaml(config: Config) -> str:
    """Write the resolved config as YAML text, which --config reads."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """A help formatter that never breaks a line inside the name of an option."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        text = " ".join(text.split())
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def make_parser(
    prog: str, description: str, flags: argparse.ArgumentParser | None = None
) -> jsonargparse.ArgumentParser:
    """Make the parser of Config, with --config, --print_config, --help and an option --group.field for every field.

    prog, description: name and text of the command in --help.
    flags: parser of the command's own switches. It reads them before this parser; here they only appear in --help.
    """
    epilog = ""
    if flags is not None:
        shown = (f"{a.option_strings[0]} {a.metavar or ''}".strip() + f": {a.help}" for a in flags._actions)
        epilog = "Besides: " + "; ".join(shown) + "."
    parser = jsonargparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", action="config", help="YAML file of this configuration")
    parser.add_class_arguments(Config)
    return parser


def parse_config(
    parser: jsonargparse.ArgumentParser, argv: list[str], warn: Callable[[str], None] = warn_user
) -> Config:
    """Parse command-line arguments into a Config and check it.

    argv: arguments without the program's name. warn: called with a sentence for each field that has its old name.
    Raises UserError, in one sentence, for an unknown field, a wrong type or value, or fields that do not go together.
    """
    try:
        parsed = parser.parse_args(rename_arguments(wrap_scalars(join_negative_numbers(argv)), warn))
        require_values(parsed)
        init = parser.instantiate(parsed)
        config = _plain(Config(**{f.name: init[f.name] for f in fields(Config)}))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise explain(error) from None
    except OverflowError:
        raise UserError("an integer in the configuration has more than 308 digits, which no field takes") from None
    return check(expand_user(config))


def _plain(value: Any) -> Any:
    """Replace jsonargparse's subclasses of int and float by plain numbers, in dataclasses, lists and tuples too."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    number = next((kind for kind in (float, int) if isinstance(value, kind) and not isinstance(value, bool)), None)
    return number(value) if number else value


def require_run(folder: Path, given_as: str) -> None:
    """Raise UserError unless the folder is a run folder. given_as: the argument that names it."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{given_as}: {folder} is not a run folder (it has no config.yaml)")


def load_config(path: Path) -> Config:
    """Load and check the configuration file of a run folder; fields may have their names of version 0.1."""
    return parse_config(make_parser("repo", ""), ["--config", str(path)], warn=lambda _: None)
