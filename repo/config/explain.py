"""Explain: turn what the parser says about a wrong value or an unknown key into a sentence in the user's terms."""

from __future__ import annotations

import difflib
import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from ..common.errors import UserError
from .fields import field_names, field_types, group_names
from .hints import ELSEWHERE, OF_COMMANDS

NUMBERS = {
    "PositiveInt": "an integer > 0",
    "NonNegativeInt": "an integer >= 0",
    "PositiveFloat": "a number > 0",
    "NonNegativeFloat": "a number >= 0",
    "ClosedUnitInterval": "a number in [0, 1]",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "NoneType": "null",
}
"""Name of a type -> what a field of that type takes."""

VALUES = (
    r"Given value: (.*)$",
    r"Got value: (.*)$",
    r"Not of type \w+: .*: ('.*')$",
    r"Not of type \w+: (\S+) (?:not a number|does not conform)",
)
"""Forms in which a message of the parser quotes the wrong value."""

COUNTS = {2: "two", 3: "three", 4: "four"}


def takes(kind: Any) -> str:
    """Say what a field takes. kind: the field's type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin is list:
        return f"a list, each element {takes(arguments[0])}"
    if origin is tuple:
        return f"a list of {COUNTS.get(len(arguments), len(arguments))}: {', '.join(map(takes, arguments))}"
    if origin is dict:
        return "a mapping from names to numbers" if arguments[1] is float else "a mapping from names to values"
    if origin in (Union, UnionType):
        last = [a for a in arguments if a is NoneType]
        return " or ".join(takes(a) for a in [*(a for a in arguments if a is not NoneType), *last])
    return NUMBERS.get(kind.__name__, "a group of fields")


def wrong_value(name: str, value: object) -> UserError:
    """Return the error for a field that has a value of a wrong type or range. name: the dotted field."""
    return UserError(f"{name} must be {takes(field_types()[name])}; got {value}")


def explain(error: Exception) -> UserError:
    """Turn an error of jsonargparse into a UserError of one sentence; for an unknown key it names the nearest field."""
    text = re.sub(r'Parser key "([\w.]+)":', r"\1:", " ".join(str(error).split()))
    name = text.partition(":")[0].removeprefix("argument --")
    if name in field_names():
        if "expected one argument" in text:
            return UserError(f"--{name} needs a value: {takes(field_types()[name])}")
        if found := re.search("|".join(VALUES), text):
            return wrong_value(name, next(group for group in found.groups() if group is not None))
        return UserError(f"{name} must be {takes(field_types()[name])}")
    if name in group_names():
        return UserError(f"{name} must be a group of fields, {name}.FIELD")
    unknown = _unknown_key(text)
    if unknown is None:
        return UserError(text)
    if unknown in OF_COMMANDS:
        return UserError(f"unknown configuration key {unknown!r}: {OF_COMMANDS[unknown]}")
    near = _nearest(unknown)
    flag = unknown.replace("-", "_")
    if flag != unknown and flag in near:  # fields have underscores
        return UserError(f"unknown option '--{unknown}'; did you mean '--{flag}'?")
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; --help lists all"
    return UserError(f"unknown configuration key {flag!r}{hint}")


def _unknown_key(text: str) -> str | None:
    """Return the unknown key that a message of the parser is about, None if it is about something else."""
    if found := re.search(r"[Gg]roup '([\w.]+)' does not accept option '(\w+)'", text):
        return f"{found[1]}.{found[2]}"
    if found := re.search(r"unrecognized arguments: --([\w.\-]+)", text):
        return found[1]
    if found := re.search(r"[Oo]ption '([\w.]+)' is not accepted|does not accept option '(\w+)'", text):
        return found[1] or found[2]
    return None


def _nearest(name: str) -> list[str]:
    """Return the field that an unknown key probably means, in a list that is empty if there is none.

    A close spelling comes first, then fields of the same name in other groups, then the name that another library gives
    a field, then a more distant spelling.
    """
    known, name = field_names(), name.replace("-", "_")
    last = name.rsplit(".", 1)[-1]
    if name in known:
        return [name]
    same = [k for k in known if k.rsplit(".", 1)[-1] == last]
    if same:
        return difflib.get_close_matches(name, same, 1, 0.8) or same
    if last in ELSEWHERE:
        return [ELSEWHERE[last]]
    by_last = {k.rsplit(".", 1)[-1]: k for k in known}
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return near or [by_last[n] for n in difflib.get_close_matches(last, list(by_last), 1, 0.6)]
