"""Records of finished runs: what the results need of them, small enough to be kept where the runs are not.

A comparison takes hours. With its records in a folder that outlives the runs, it can be continued on another day or
machine, and its intervals can be computed again by anybody.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import processor
from repo.common.errors import UserError, first_line
from repo.config.parse import load_config, make_parser, parse_config
from repo.config.schema import Config
from repo.evaluation.statistics import Evaluation
from repo.runs.json_lines import finite

from .matching import last_costs

TEXTS = ("prompt", "response")
"""Keys of an evaluation's responses that no quantity needs."""
OF_PROMPT = ("id", "category")
DIGITS = 6
"""Significant digits of a number in a record; costs and rewards are fp32."""


@dataclass(frozen=True)
class Record:
    """A finished run.

    Args:
        config: the fields of its configuration, by group, without the folder and the day.
        scored: options of the evaluation of its final policy.
        machine: the processor.
        minutes: that all steps took.
        tokens: response tokens that all steps learned from; None in records of earlier versions.
        reached: mean cost of the last responses of its training.
        evaluation: of its final policy, without texts.
    """

    config: dict[str, Any]
    scored: list[str]
    machine: str
    minutes: float
    reached: float
    evaluation: Evaluation
    tokens: int | None = None

    @staticmethod
    def of(run: Path, scored: Sequence[str], evaluation: Evaluation) -> Record:
        """Take the record of a run folder."""
        config = comparable(load_config(run / "config.yaml"))
        about = list(scored), processor(), minutes_of(run), last_costs(run)
        return Record(config, *about, evaluation, tokens_of(run))

    def write(self, file: Path) -> None:
        """Write the record, a line for each column of numbers."""
        responses, samples = self.evaluation.records, self.evaluation.samples
        names = [name for name in responses[0] if name not in (*TEXTS, *OF_PROMPT)]
        columns = {name: [_rounded(response[name]) for response in responses] for name in names}
        about = {name: value for name, value in vars(self).items() if name != "evaluation"}
        about |= {"cost_limit": self.evaluation.cost_limit, "samples": samples}
        about |= {name: [response[name] for response in responses[::samples]] for name in OF_PROMPT}
        lines = [f"{json.dumps(name)}: {json.dumps(finite(value))}" for name, value in about.items()]
        lines += [f"{json.dumps('column ' + name)}: {json.dumps(finite(value))}" for name, value in columns.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Record:
        """Read a record.

        Raises:
            UserError: the file is no record.
        """
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            columns = {name.removeprefix("column "): x for name, x in content.items() if name.startswith("column ")}
            samples, rows = content["samples"], zip(*columns.values(), strict=True)
            prompts = list(zip(*(content[name] for name in OF_PROMPT), strict=True))
            names = (*OF_PROMPT, *columns)
            responses = [dict(zip(names, (*prompts[i // samples], *row), strict=True)) for i, row in enumerate(rows)]
            about = [content[name] for name in ("config", "scored", "machine", "minutes", "reached")]
            return Record(*about, Evaluation(responses, content["cost_limit"]), content.get("tokens"))
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{file} is not a record of a run: {first_line(error)}") from None

    def require(self, file: Path, options: Sequence[str], scored: Sequence[str]) -> None:
        """Raise UserError unless the record is of these options of training and of evaluation.

        Fields that are newer than the record have their default in it, which does what was done before them.
        """
        wanted = comparable(parse_config(make_parser("", ""), list(options)))
        if with_defaults(self.config) != wanted or self.scored != list(scored):
            raise UserError(f"--records: {file} is of another configuration; choose another folder")


def comparable(config: Config) -> dict[str, Any]:
    """Return the fields of a configuration by which two runs are the same, as JSON keeps them."""
    same = replace(config, out=None, data=replace(config.data, date=None))
    content: dict[str, Any] = json.loads(json.dumps(asdict(same)))
    return content


def with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a record's configuration with the default of each field that it has not."""
    full = comparable(Config())
    for name, value in config.items():
        full[name] = {**full.get(name, {}), **value} if isinstance(value, dict) else value
    return full


def minutes_of(run: Path) -> float:
    """Return the minutes that all steps of a run took."""
    return sum(x for line in metrics_of(run) for key, x in line.items() if key.startswith("seconds_")) / 60


def tokens_of(run: Path) -> int:
    """Return the response tokens that all steps of a run learned from."""
    return sum(
        int(line["pair_tokens"] if "pair_tokens" in line else line["response_tokens"]) for line in metrics_of(run)
    )


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _rounded(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
