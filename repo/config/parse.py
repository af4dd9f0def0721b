"""Parse YAML files, presets and dotted overrides into a checked Config; say what is wrong in one sentence."""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from ..common.errors import UserError
from .renamed import rename_arguments
from .schema import Config, check, field_names

PRESETS = Path(__file__).parent / "presets"

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def preset_names() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that --config reads."""
    return yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)


class HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Never breaks a line within a switch."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        text = " ".join(text.split())
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def make_parser(
    prog: str, description: str, flags: argparse.ArgumentParser | None = None
) -> jsonargparse.ArgumentParser:
    """A parser of Config with --config, --print_config, --help and dotted overrides.

    flags: a parser of the command's own switches, which are read before and appear in --help only.
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


def _out_of_range(match: re.Match[str]) -> str:
    takes = re.sub(r"v([<>=]+)", r"\1 ", match[3])
    return f"{match[1]} must be {takes}; got {match[2]}"


def _explain(error: Exception) -> UserError:
    """One sentence; for an unknown key, with the nearest name."""
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(str(error).split()))
    text = re.sub(r"([\w.]+): Not of type (\w+): \D+(?: 10)?: ('.*')", r"\1 must be a \2; got \3", text)
    text = re.sub(r"([\w.]+): Not of type \w+: (\S+) does not conform to restriction (.*)", _out_of_range, text)
    known = field_names()
    group = re.search(r"[Gg]roup '([\w.]+)' does not accept option '(\w+)'", text)
    flag = re.search(r"unrecognized arguments: --([\w.\-]+)", text)
    bare = re.search(r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '(\w+)'", text)
    name = None
    if group:
        name = f"{group[1]}.{group[2]}"
    elif flag:
        name = flag[1].replace("-", "_")
    elif bare:
        name = bare[1] or bare[2]
    if name is None:
        return UserError(text)
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    near = near or [by_last[n] for n in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_last), 1, 0.6)]
    hint = f"; did you mean {near[0]!r}?" if near else "; --help lists all"
    return UserError(f"unknown configuration key {name!r}{hint}")


def warn_user(sentence: str) -> None:
    """Print a warning of the command line."""
    print(f"warning: {sentence}", file=sys.stderr)


def parse_config(
    parser: jsonargparse.ArgumentParser, argv: list[str], warn: Callable[[str], None] = warn_user
) -> Config:
    """Parse and check. warn: is told of fields under old names. Raises UserError on bad input."""
    try:
        init = parser.instantiate(parser.parse_args(rename_arguments(argv, warn)))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise _explain(error) from None
    return check(_plain(Config(**{f.name: init[f.name] for f in fields(Config)})))


def _plain(value: Any) -> Any:
    """The value with int and float in place of the parser's own subclasses of them."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _plain(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    number = next((kind for kind in (float, int) if isinstance(value, kind) and not isinstance(value, bool)), None)
    return number(value) if number else value


def load_config(path: Path) -> Config:
    """Load the configuration that a run folder holds, also one of version 0.1."""
    return parse_config(make_parser("repo", ""), ["--config", str(path)], warn=lambda _: None)
