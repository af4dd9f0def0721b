"""The manifest of a scorer: the meaning and scale of its numbers, and two answers that check their sign."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.errors import UserError

FILE = "scorer.json"
ANSWERS = {"prompt", "lower", "higher"}


@dataclass(frozen=True)
class Manifest:
    """The content of `scorer.json` in a model's folder, or of the dict `function.manifest`; every key may be left out.

    The score in use is (raw - offset) / scale.
    """

    units: str | None = None
    """Meaning of one unit of the score in use, in words."""
    offset: float = 0.0
    """Raw score that counts as 0."""
    scale: float = 1.0
    """Raw score per unit, not 0; negative to reverse the sign of the raw score."""
    sign_check: dict[str, Any] | None = None
    """prompt, lower, higher: a prompt and two canned answers, of which `higher` must get the higher score in use.
    Further keys are columns of the prompt's record, for a function that takes them."""

    def apply(self, raw: Tensor) -> Tensor:
        """Compute the scores in use, (raw - offset) / scale, in the shape of `raw`."""
        return (raw - self.offset) / self.scale


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_check(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(name), str) for name in ANSWERS)


TAKES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "units": (lambda value: isinstance(value, str), "a string"),
    "offset": (_is_number, "a finite number"),
    "scale": (lambda value: _is_number(value) and value != 0, "a finite number other than 0"),
    "sign_check": (_is_check, "a mapping of prompt, lower and higher to strings"),
}


def make_manifest(content: Any, where: str) -> Manifest:
    """Check the content of a manifest and make it a Manifest.

    content: parsed JSON or a dict. where: the scorer that it belongs to, for messages. Raises UserError for an unknown
    key or a wrong value.
    """
    if not isinstance(content, dict):
        raise UserError(f"{where} must be a mapping with the keys {', '.join(TAKES)}; got {type(content).__name__}")
    for key, value in content.items():
        if key not in TAKES:
            near = difflib.get_close_matches(str(key), TAKES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(TAKES)}"
            raise UserError(f"{where} has the unknown key {key!r}; {hint}")
        accepts, takes = TAKES[key]
        if not accepts(value):
            raise UserError(f"{where}: {key} must be {takes}; got {value!r}")
    return Manifest(**content)


def read_manifest(folder: Path, where: str) -> Manifest:
    """Read the manifest in a model's folder; returns the default one if there is no file.

    where: the scorer that it belongs to, for messages. Raises UserError if the file is not a valid manifest.
    """
    path = folder / FILE
    if not path.is_file():
        return Manifest()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(f"{where}: {path} is not JSON: {error}") from None
    return make_manifest(content, f"{where}: {path}")
