"""Fields: the dotted names and the types of all configuration fields."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_origin, get_type_hints

from .schema import Config


@cache
def field_types(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Map the dotted name of every field of a configuration class to its type, those of its groups included.

    kind: the dataclass. prefix: put before each name.
    """
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        group: Any = hint
        types |= field_types(group, f"{prefix}{name}.") if is_dataclass(hint) else {prefix + name: hint}
    return types


def field_names() -> list[str]:
    """List the dotted names of all fields, those of groups included."""
    return list(field_types())


def group_names() -> list[str]:
    """List the names of the groups of fields."""
    return list(dict.fromkeys(name.partition(".")[0] for name in field_names() if "." in name))


def list_names() -> list[str]:
    """List the names of the fields that take a list of any length."""
    return [name for name, kind in field_types().items() if get_origin(kind) is list]
