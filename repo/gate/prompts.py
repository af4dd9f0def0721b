"""Validation prompts of the gate: prompts that are neither trained on nor held out for evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.errors import UserError
from ..common.seeds import seed_from
from ..config.schema import Config
from ..data.prompts import Prompt
from ..data.sources import EMBEDDED, is_embedded, read_prompts
from ..evaluation.statistics import FEWEST_PROMPTS

PROMPTS = 64
"""Validation prompts, if there are as many."""
VALIDATION = "valid"
"""Split of the embedded prompts that is neither trained on nor held out."""


def chosen(prompts: Sequence[Prompt], count: int = PROMPTS) -> list[Prompt]:
    """Return `count` prompts of different texts, or all if there are fewer, chosen by a hash of their ids."""
    ordered = sorted(prompts, key=lambda prompt: seed_from("gate", prompt.id), reverse=True)
    of_text = {prompt.text: prompt for prompt in ordered}  # the last of a text stays, that of the smallest hash
    return sorted(of_text.values(), key=lambda prompt: seed_from("gate", prompt.id))[:count]


def set_apart(train: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Divide training prompts by their texts: (those that are trained on, the gate's: PROMPTS, but at most half).

    Where a text occurs several times, as in several pairs of a prompt, the gate gets one of its prompts and none is
    trained on, or all are.
    Raises UserError if too few would be left to either for an interval.
    """
    texts = len({prompt.text for prompt in train})
    gate = chosen(train, min(PROMPTS, texts // 2))
    if len(gate) < FEWEST_PROMPTS:
        raise UserError(
            f"gate.every: the gate sets half of the training prompts apart, up to {PROMPTS}, and needs "
            f"{FEWEST_PROMPTS}; data.train has only {texts} different ones"
        )
    taken = {prompt.text for prompt in gate}
    return [prompt for prompt in train if prompt.text not in taken], gate


def gate_data(
    config: Config, folder: Path | None, train: list[Prompt], tokenizer: Any, shape: Any, console: Console
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts that are trained on and the gate's, and print where the latter come from.

    They are a split of the embedded prompts that nothing else reads, else some of `train`, which are then not trained
    on. Raises UserError if there are too few.
    """
    if not config.gate.every:
        return train, []
    sources = config.data.train, config.data.eval
    if is_embedded(sources[0]) and not any(source.endswith(f"#{VALIDATION}") for source in sources):
        source = f"{EMBEDDED}#{VALIDATION}"
        return train, chosen(read_prompts(config, source, VALIDATION, folder, tokenizer, shape, console))
    train, gate = set_apart(train)
    console.print(f"gate: {len(gate)} of the training prompts are set apart for it", markup=False, highlight=False)
    return train, gate
