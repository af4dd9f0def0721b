"""Scales: evaluations of one run's policy at several scales of its update, kept so that none is made twice."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import make_parent, write_text
from ..config.schema import Config
from ..models.scaled import require_scale
from ..runs.checkpoint import MANIFEST
from ..runs.folder import read_json
from .comparison import Contender, read_evaluation
from .evaluator import content_of, settings_of
from .statistics import Evaluation, measured

BEFORE = "before"
"""Stem of the run's evaluation of its reference."""


def parse_scales(text: str) -> list[float]:
    """Read scales separated by commas, as "0.25,0.5,1"; returns them by size.

    Raises UserError for a text that is no number, a scale out of (0, 1.5], or one that is given twice.
    """
    scales = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise UserError(f"--scales must be numbers separated by commas, as 0.5,1; got {text!r}") from None
        scales.append(require_scale(value, "--scales: each"))
    names = [name_of(scale) for scale in scales]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"--scales: {repeated} is given twice")
    return sorted(scales)


def name_of(scale: float) -> str:
    """Name a scale in tables and files."""
    return f"{scale:g}"


@dataclass(frozen=True)
class ScaledEvaluations:
    """The kept evaluations of one checkpoint of a run, a file for each scale.

    run: the run folder. source: folder of the checkpoint. config: of the run. folder: where the files are.
    """

    run: Path
    source: Path
    config: Config
    folder: Path

    def path(self, scale: float) -> Path:
        """Return the file of a scale."""
        return self.folder / f"{self.source.name}-{name_of(scale)}.json"

    def about(self, scale: float) -> dict[str, Any]:
        """Return what an evaluation of a scale depends on besides prompts and settings, in the types that JSON has.

        `weights` are the sizes and checksums of the checkpoint's files, since a run that goes on from an earlier step
        may write another checkpoint of this name.
        """
        evaluation = self.config.evaluation
        asked = {"prompts": evaluation.prompts, "samples_per_prompt": evaluation.samples_per_prompt}
        weights = json.loads((self.source / MANIFEST).read_text(encoding="utf-8"))
        return {"checkpoint": self.source.name, "scale": scale, "asked": asked, "weights": weights}

    def is_known(self, scale: float) -> bool:
        """Tell whether the file of a scale holds an evaluation of the same weights, made in the same way."""
        content = read_json(self.path(scale))
        wanted = {**self.about(scale), **settings_of(self.config), "data": self.config.data.eval}
        return isinstance(content, dict) and all(content.get(key) == value for key, value in wanted.items())

    def write(self, scale: float, evaluation: Evaluation) -> None:
        """Keep the evaluation of a scale. Raises UserError if the file cannot be written."""
        make_parent(self.path(scale), "--out")
        content = content_of(self.config, evaluation, policy=str(self.run), **self.about(scale))
        write_text(self.path(scale), json.dumps(content, indent=1, ensure_ascii=False))

    def read(self, scales: Sequence[float], cost_limit: float | None = None) -> list[Contender]:
        """Read the kept evaluations, after the reference's where the run has one on the same prompts.

        cost_limit: replaces the run's; None keeps it. Each contender is named by its scale, the reference by 0.
        """
        found = [(name_of(scale), *read_evaluation(self.path(scale), cost_limit)) for scale in scales]
        found = [*self._reference(found[0][1], cost_limit), *found]
        return [Contender(name, e, made, ((name, measured(e.columns)),)) for name, e, made in found]

    def _reference(
        self, scaled: Evaluation, cost_limit: float | None
    ) -> Iterator[tuple[str, Evaluation, dict[str, Any]]]:
        """Yield the evaluation before training if it was made in the same way as `scaled`."""
        path = self.run / "eval" / f"{BEFORE}.json"
        if not path.is_file():
            return
        before, made = read_evaluation(path, cost_limit)
        same = all(made.get(key) == value for key, value in settings_of(self.config).items())
        if same and before.ids == scaled.ids and before.samples == scaled.samples:
            yield "0", before, made


def points_of(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """List the scale and every quantity of each contender, as JSON values."""
    return [{"scale": float(c.name), "quantities": c.trail[-1][1]} for c in contenders]
