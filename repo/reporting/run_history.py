"""Run history: read a run folder back, also while the run is still training."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..common.errors import UserError
from ..evaluation.statistics import Evaluation
from ..scoring.safety import round_limit

Record = Mapping[str, Any]
SAMPLE_KEYS = {"step", "id", "category", "prompt", "response", "reward", "cost"}
EVALUATION_KEYS = SAMPLE_KEYS - {"step"} | {"tokens"}
TYPES = {"step": (int, "whole number"), "id": (str, "text"), "prompt": (str, "text"), "response": (str, "text")}


@dataclass(frozen=True)
class HeldOut:
    """A held-out evaluation of a run.

    evaluation: its responses. overall: every quantity with its interval, computed anew rather than read from the file.
    """

    evaluation: Evaluation
    overall: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class History:
    """The content of a run folder so far.

    name: name of the folder.
    config: the resolved configuration, as nested mappings.
    versions: versions of the packages, by name.
    metrics, samples: records of metrics.jsonl and samples.jsonl.
    evaluations: `before` and `after` training, as far as they exist.
    notes: sentences about content that was left out.
    """

    name: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Sequence[Record]
    samples: Sequence[Record]
    evaluations: Mapping[str, HeldOut]
    notes: list[str] = field(default_factory=list)

    @property
    def limit(self) -> float:
        """Return d rounded to fp32, as the costs are."""
        return _limit(self.config)

    @property
    def samples_per_prompt(self) -> int:
        """Return the responses to each prompt of a training step."""
        return int(self.config.get("rollout", {}).get("samples_per_prompt", 2))

    @property
    def steps(self) -> np.ndarray:
        """Return the numbers of the steps done, (S,), counted from 1."""
        return np.array([r["step"] + 1 for r in self.metrics])

    def series(self, key: str) -> np.ndarray:
        """Return a metric by step, (S,) fp64, NaN if it is null or missing."""
        return column(self.metrics, key)

    @cached_property
    def sampled(self) -> list[int]:
        """List the steps that have samples, counted from 0."""
        return sorted({s["step"] for s in self.samples})

    @cached_property
    def measured(self) -> np.ndarray:
        """Tell which steps sampled the policy, (S,) bool: with methods that learn from pairs not all.

        All, where no step says so: records of earlier versions may not.
        """
        safe_rate = np.isfinite(self.series("safe_rate"))
        return safe_rate if safe_rate.any() else np.ones_like(safe_rate)

    @property
    def tenth(self) -> int:
        """Return the number of steps that `start` and `now` cover: a tenth of those with samples, at least 1."""
        return max(1, len(self.sampled) // 10)

    @cached_property
    def start(self) -> list[Record]:
        """Return the training samples of the first tenth of the steps."""
        return [s for s in self.samples if s["step"] <= self.sampled[self.tenth - 1]]

    @cached_property
    def now(self) -> list[Record]:
        """Return the training samples of the last tenth of the steps."""
        return [s for s in self.samples if s["step"] >= self.sampled[-self.tenth]]

    def responses(self, name: str) -> Sequence[Record]:
        """Return the responses of an evaluation, `before` or `after`; [] if it does not exist."""
        return self.evaluations[name].evaluation.records if name in self.evaluations else []

    @cached_property
    def paired(self) -> bool:
        """Tell whether both evaluations exist and have the same prompts in the same order, so that they compare."""
        before, after = ([r["id"] for r in self.responses(name)] for name in ("before", "after"))
        return bool(before) and before == after


def column(records: Iterable[Record], key: str) -> np.ndarray:
    """Return a numeric key of n records, (n,) fp64, NaN if it is null or missing."""
    values = (r.get(key) for r in records)
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def read(folder: Path) -> History:
    """Read a run folder. Raises UserError if it is not a run, has no finished step yet, or holds a damaged file."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder (it has no config.yaml)")
    notes: list[str] = []
    # a step's samples are written after its metrics: reading them first means that no sample lacks its metrics
    samples = _json_lines(folder / "samples.jsonl", SAMPLE_KEYS, notes)
    metrics = _json_lines(folder / "metrics.jsonl", {"step"}, notes)
    scored = [s for s in samples if _scored(s)]
    if len(scored) < len(samples):
        notes.append(f"{len(samples) - len(scored)} samples without a reward or a cost were left out.")
    if not metrics:
        raise UserError(f"{folder} has no metrics yet: metrics.jsonl has no line; a report needs one step")
    config = _config(folder / "config.yaml")
    evaluations = {}
    for name in ("before", "after"):
        if (path := folder / "eval" / f"{name}.json").is_file():
            evaluations[name] = _evaluation(path, _limit(config))
    versions = folder / "versions.json"
    known = _json(versions) if versions.is_file() else {}
    return History(folder.resolve().name, config, known, metrics, scored, evaluations, notes)


def _scored(record: Record) -> bool:
    return all(isinstance(record[k], int | float) and math.isfinite(record[k]) for k in ("reward", "cost"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(_text(path))
        float(config["algorithm"]["cost_limit"]), config["algorithm"]["method"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: it has no readable algorithm.method and algorithm.cost_limit") from error
    return config


def _limit(config: Mapping[str, Any]) -> float:
    return round_limit(float(config["algorithm"]["cost_limit"]))


def _evaluation(path: Path, limit: float) -> HeldOut:
    content = _json(path)
    responses = content.get("responses") if isinstance(content, dict) else None
    if not responses or not isinstance(responses, list):
        raise UserError(f"{path} is damaged: it has no responses")
    for i, record in enumerate(responses):
        if fault := _fault(record, EVALUATION_KEYS):
            raise UserError(f"{path} is damaged: response {i} {fault}")
        if not _scored(record):
            raise UserError(f"{path} is damaged: response {i} has no reward or no cost")
    evaluation = Evaluation(responses, limit)
    try:
        return HeldOut(evaluation, evaluation.summary()["overall"])
    except KeyError as error:
        raise UserError(f"{path} is damaged: some responses have {error.args[0]} and others do not") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: a response has a value that is not a number: {error}") from error
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def _fault(record: Any, keys: set[str]) -> str | None:
    """Describe what is wrong with a record; None if it is an object with these keys and their types."""
    if not isinstance(record, dict):
        return "is not an object"
    if missing := keys - record.keys():
        return f"lacks {', '.join(sorted(missing))}"
    for key, (kind, name) in TYPES.items():
        if key in keys and not isinstance(record[key], kind):
            return f"has no {name} as its {key}"
    return None


def _json_lines(path: Path, keys: set[str], notes: list[str]) -> list[Record]:
    """Read the objects of a JSON-lines file, without a last line that is still being written.

    keys: keys that every object must have. notes: a sentence is added if the last line was left out.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} is not a run folder (it has no {path.name})")
    lines = _text(path).split("\n")
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if fault := _fault(record, keys):
                raise ValueError(f"it {fault}")
        except ValueError as error:
            if number == len(lines):  # no newline follows: it may still be in writing
                notes.append(f"The last line of {path.name} is not complete and was left out: the run was writing it.")
                continue
            raise UserError(f"{path} is damaged in line {number}: {error}") from error
        records.append(record)
    return records
