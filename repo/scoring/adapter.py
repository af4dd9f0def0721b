"""Adapters: LoRA folders of peft as scorers, merged into the base model that they name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils import logging

PREFIX = "base_model.model."
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "score_head.weight")


def saved_weights(folder: str) -> dict[str, torch.Tensor]:
    """Read an adapter's weights; names are those of the base model, where the module is saved whole."""
    path = Path(folder) / "adapter_model.safetensors"
    weights = load_file(path) if path.is_file() else torch.load(path.with_suffix(".bin"), weights_only=True)
    return {name.removeprefix(PREFIX): weight for name, weight in weights.items()}


def outputs_of(weights: dict[str, torch.Tensor]) -> int | None:
    """Return how many outputs the classification head has that is saved beside the adapter; None without a head."""
    return next((weights[name].shape[0] for name in HEADS if name in weights), None)


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence the warnings of transformers in the context."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def merge(model: Any, folder: str) -> Any:
    """Add an adapter's weights to the model's and return the model; modules that are saved whole replace its own.

    Raises ValueError for an adapter of a kind that cannot be merged.
    """
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, folder)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        kind = next(iter(adapted.peft_config.values())).peft_type
        raise ValueError(f"an adapter of type {kind} cannot be merged; a scorer takes LoRA")
    return adapted.merge_and_unload()
