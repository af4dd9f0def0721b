"""Rollout: what sampling holds beside the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from .activations import MOST_CALLS
from .live_bytes import LiveBytes
from .process import Process, parameters_of
from .stand_ins import KERNELS, Pattern, sized
from .twin import Kind

PROBE = 8  # tokens of the pass that fills a cache
SAMPLING_BYTES = 4 + 4 + 8  # per row and entry of the vocabulary: logits and probabilities fp32, their sums fp64


def rows_of(process: Process) -> int:
    """Return the most responses that are decoded together, in training or in the evaluation."""
    r, e = process.config.rollout, process.config.evaluation
    batches = [(-(-r.prompts_per_step // process.processes), r.samples_per_prompt)]
    batches += [(e.prompts, e.samples_per_prompt)] if e.prompts else []
    return max(min(prompts, max(1, r.batch_size // samples)) * samples for prompts, samples in batches)


def decoding(process: Process) -> dict[str, float]:
    """Map names to bytes of the copies of the weights, and of the logits, that sampling makes."""
    settings, weights = process.config.model, parameters_of(process.model)
    held: dict[str, float] = {}
    if settings.dtype == "bfloat16" and not settings.lora_rank and process.shards == 1:
        held["decode weights bfloat16"] = 2 * parameters_of(process.model, trained_only=True)
    elif process.device == "cpu":
        held["packed decode weights (CPU)"] = (2 if process.multiplies_in_bf16() else 4) * weights
    rows = rows_of(process)
    held[f"logits of {rows} rows and their distribution"] = SAMPLING_BYTES * rows * process.vocabulary
    return held


def cache_bytes(process: Process, kinds: list[Kind]) -> int:
    """Return the bytes of the KV cache of all rows at their longest.

    Raises Exception of any type if the model cannot fill a cache on "meta".
    """
    tokens = process.longest_prompt + process.config.rollout.max_response_tokens
    per_token = sum(kind.count * cached_numbers(kind, process) for kind in kinds) / PROBE
    return int(rows_of(process) * tokens * per_token * process.dtype.itemsize)


@torch.no_grad()
def cached_numbers(kind: Kind, process: Process) -> int:
    """Count the numbers that one layer of a kind keeps for PROBE tokens."""
    trunk: Any = kind.trunk
    cache, ids = DynamicCache(config=trunk.config), torch.zeros(1, PROBE, dtype=torch.int64, device="meta")
    pattern = Pattern(None, process.kernel(trunk.config))
    with sized(trunk, pattern), LiveBytes(MOST_CALLS, kernels=KERNELS):
        trunk(input_ids=ids, position_ids=ids, past_key_values=cache, use_cache=True)
    layers: Any = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(layer.keys.numel() + layer.values.numel() for layer in layers)
