"""Folders of adapters: the model that an adapter of peft was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UserError, first_line

FILE = "adapter_config.json"


def base_of(path: str, where: str) -> str | None:
    """Return the base model that an adapter folder names, None for any other path.

    A folder that holds a whole model as well is one for transformers, which loads both from there.

    where: the field or the scorer that names the path, for messages. Raises UserError if the folder names no base.
    """
    file = Path(path) / FILE
    if not file.is_file() or (Path(path) / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{where}: {file} is not the config of an adapter: {first_line(error)}") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{where}: {file} names no base model (base_model_name_or_path)")
    return base
