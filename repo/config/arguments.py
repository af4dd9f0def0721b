"""Arguments: what is mended or refused on the way from a command line to the configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from ..common.errors import UserError
from .explain import wrong_value
from .fields import field_types, group_names, list_names
from .schema import Config

NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?|-\.?inf", re.IGNORECASE)
PATHS = (
    "out",
    "model.path",
    "data.train",
    "data.eval",
    "ptx.data",
    "scoring.reward",
    "scoring.cost",
    "evaluation.judge",
)
"""Fields that may name a file or a folder."""


def join_negative_numbers(argv: Iterable[str]) -> list[str]:
    """Join an option and a negative number behind it with "=", since argparse takes -1e-1 for an option."""
    joined: list[str] = []
    for argument in argv:
        if NEGATIVE.fullmatch(argument) and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def wrap_scalars(argv: Iterable[str]) -> list[str]:
    """Put a single value of an option that takes a list into a list, so that `--loggers wandb` is `[wandb]`."""
    wrapped: list[str] = []
    options, expected = {f"--{name}" for name in list_names()}, False
    for argument in argv:
        option, equals, value = argument.partition("=")
        if expected:
            argument = _listed(argument)
        elif option in options and equals:
            argument = f"{option}={_listed(value)}"
        expected = argument in options
        wrapped.append(argument)
    return wrapped


def _listed(text: str) -> str:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    return json.dumps([value]) if isinstance(value, (str, int)) else text


def require_values(parsed: Any) -> None:
    """Raise UserError for a field that is null although its type has no null.

    parsed: jsonargparse's namespace.
    """
    for group in group_names():
        if not hasattr(parsed[group], "__dict__"):
            raise UserError(f"{group} must be a group of fields; got {_yaml(parsed[group])}")
    for name, kind in field_types().items():
        value = parsed[name]
        if value is None and NoneType not in get_args(kind):
            raise wrong_value(name, "null")


def _yaml(value: object) -> str:
    return "null" if value is None else repr(value)


def user_path(text: str) -> Path:
    """Read a path of a command line; ~ at its start is the home folder. The shell leaves it in `--out=~/x`."""
    return Path(text).expanduser()


def expand_user(config: Config) -> Config:
    """Replace ~ at the start of every path of the configuration by the home folder."""
    for name in PATHS:
        group, _, field = name.rpartition(".")
        owner = getattr(config, group) if group else config
        value: Any = dataclasses.replace(owner, **{field: _expanded(getattr(owner, field))})
        config = _replaced(config, group, value) if group else value
    return config


def _replaced(config: Config, group: str, value: Any) -> Config:
    changes: dict[str, Any] = {group: value}
    return dataclasses.replace(config, **changes)


def _expanded(value: Any) -> Any:
    if isinstance(value, dict):
        return {os.path.expanduser(name): weight for name, weight in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) else value
