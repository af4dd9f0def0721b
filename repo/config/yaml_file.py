"""YAML files: read them strictly, since a key that is given twice would silently lose its first value."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError


class _Strict(yaml.SafeLoader):
    """A loader that refuses a mapping in which a key occurs twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key != "<<":
                if key in seen:
                    raise UserError(f"{key!r} is given twice, in lines {seen[key]} and {line}; join the two")
                seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises UserError, with the lines, if a mapping has a key twice; OSError, UnicodeDecodeError and yaml.YAMLError as
    their libraries do.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Strict)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
