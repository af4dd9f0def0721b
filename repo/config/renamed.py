"""Renamed: names that configuration fields had in version 0.1. They work for one more release, with a warning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from .fields import list_names
from .yaml_file import read_yaml

RENAMED = {
    "algorithm.mode": "algorithm.cost_mode",
    "algorithm.kl_ratio": "algorithm.kl_importance_weighted",
    "rollout.max_new_tokens": "rollout.max_response_tokens",
    "critic.start": "critic.init_from",
    "critic.discount": "critic.gamma",
    "critic.trace": "critic.gae_lambda",
    "optimizer.states": "optimizer.state_dtype",
}
"""Old name -> new name of a field."""

OPTION = re.compile(r"--(?P<name>[a-z_]+\.[a-z_]+)(?P<value>=.*)?", re.DOTALL)


def new_name(field: str) -> str:
    """Return the present dotted name of a field. field: its old or its present name."""
    return RENAMED.get(field, field)


def rename_arguments(argv: list[str], warn: Callable[[str], None]) -> list[str]:
    """Rewrite command-line options, and the YAML files given with --config, that use old names.

    warn: called with a sentence for each old name that is used.
    Returns the arguments with present names; a file that uses old names is replaced by its rewritten YAML text.
    Raises UserError if a file gives a field under both names.
    """
    return list(_renamed(iter(argv), warn))


def _renamed(argv: Iterator[str], warn: Callable[[str], None]) -> Iterator[str]:
    for argument in argv:
        if argument == "--config":
            yield argument
            yield from (_rename_file(path, warn) for path in [next(argv, None)] if path is not None)
        elif argument.startswith("--config="):
            yield f"--config={_rename_file(argument.removeprefix('--config='), warn)}"
        elif (option := OPTION.fullmatch(argument)) and option["name"] in RENAMED:
            warn(f"--{option['name']} is now --{RENAMED[option['name']]}; the next release removes the old name")
            yield f"--{RENAMED[option['name']]}{option['value'] or ''}"
        else:
            yield argument


def _rename_file(path: str, warn: Callable[[str], None]) -> str:
    """Return the path, or rewritten YAML text if the file is empty, uses old names or gives a list one value.

    Raises UserError if the file is no YAML of fields and groups, or gives a field under both names.
    """
    try:
        content = read_yaml(Path(path).expanduser())
    except OSError:
        return path  # the parser reports what is wrong with it
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return "{}"
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a mapping of fields and groups of fields; got {content!r:.80}")
    old = [name for name in RENAMED if _has(content, name)]
    for name in old:
        group, field = name.split(".")
        field_now = RENAMED[name].split(".")[1]
        if field_now in content[group]:
            raise UserError(f"{path} gives both {name} and {RENAMED[name]}, its new name; leave {name} out")
        content[group][field_now] = content[group].pop(field)
        warn(f"{path}: {name} is now {RENAMED[name]}; the next release removes the old name")
    listed = wrap_scalars(content)
    return yaml.safe_dump(content, sort_keys=False) if old or listed else path


def wrap_scalars(content: Any) -> bool:
    """Put each single value of a list field into a list, in place. content: parsed YAML. Returns whether it did."""
    changed = False
    for name in list_names():
        group, _, field = name.rpartition(".")
        fields = content.get(group) if group and isinstance(content, dict) else content
        if isinstance(fields, dict) and isinstance(fields.get(field), (str, int)):
            fields[field], changed = [fields[field]], True
    return changed


def _has(content: Any, name: str) -> bool:
    """Tell whether parsed YAML sets the field with this dotted name."""
    group, field = name.split(".")
    fields = content.get(group) if isinstance(content, dict) else None
    return isinstance(fields, dict) and field in fields
