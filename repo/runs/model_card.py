"""Model card of an exported policy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..config.method import describe_method
from ..config.schema import Config
from ..scoring.scorers import EMBEDDED, scorer_names


def model_card(
    config: Config, steps: int, table: Sequence[tuple[str, str, str, str]], verdict: str = "", pairs: Sequence[str] = ()
) -> str:
    """Write a model card in Markdown: what was trained, how, and what the held-out evaluation measured.

    steps: steps of training done. table: rows of (quantity, before, after, change) as text; empty leaves it out.
    verdict: a sentence on held-out prompts, which follows the table. pairs: lines that show responses, after it.
    """
    algorithm = config.algorithm
    base = "SmolLM2-135M-Instruct" if config.model.path == EMBEDDED else Path(config.model.path).name
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [rlhf, safe-rlhf, repo]",
        "---",
        "",
        "# Policy aligned with RePO's training loop",
        "",
        f"Base model: {code(base)}. Method: {describe_method(asdict(config))}; cost limit {algorithm.cost_limit}, "
        f"beta {algorithm.beta}, {steps} steps, seed {config.seed}.",
        f"Reward: {code(config.scoring.reward)}. Cost: {code(config.scoring.cost)}.",
        *_embedded(config),
        "",
    ]
    if table:
        lines += [
            "Held-out prompts, mean [95 % bootstrap interval over prompts]:"
            if has_intervals(table)
            else "Held-out prompts, means; too few prompts for intervals:",
            "",
            "| | before | after | change |",
            "|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in table),
            "",
        ]
    if verdict:
        lines += [f"{verdict[0].upper()}{verdict[1:]}.", ""]
    if pairs:
        lines += [*pairs, ""]
    lines.append("Scores are those of the scorers named above; no claim is made beyond them.")
    return "\n".join(lines) + "\n"


def has_intervals(rows: Sequence[tuple[str, str, str, str]]) -> bool:
    """Tell whether any cell of these rows has an interval."""
    return any("[" in cell for _, *cells in rows for cell in cells)


def _embedded(config: Config) -> list[str]:
    """Say what the scorer "embedded" is, if reward or cost use it."""
    if EMBEDDED not in scorer_names(config.scoring):
        return []
    return [
        "`embedded`: the scorers that the package builds on hidden states of SmolLM2-135M-Instruct; "
        "`docs/embedded-default.md` in its repository says what they were fitted to and how well they do."
    ]


def code(value: object) -> str:
    """Quote text as Markdown code, fenced so that backticks in the text cannot end it."""
    text = " ".join(str(value).split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`"
