"""The hidden states of several responses to a prompt, with the prompt computed once.

A group of GRPO has the same prompt in every row. The decoder reads each different prompt once, keeps its keys and
values with their graph, and reads the responses after them, each with a copy of its prompt's: the gradients of the
copies add up, so values and gradients are those of whole rows but for rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

SELECTED = (DynamicLayer, DynamicSlidingWindowLayer)  # their state is keys and values, one row a sequence


def why_not_shared(model: Any) -> str | None:
    """Return why responses cannot share the computation of a prompt in a language model; None if they can."""
    layers = {type(layer) for layer in DynamicCache(config=model.config).layers} - set(SELECTED)
    names = ", ".join(sorted(kind.__name__ for kind in layers))
    return f"{type(model).__name__} caches in {names}" if layers else None


def states_before(decoder: Any, input_ids: Tensor, attention_mask: Tensor, count: int, share: bool) -> Tensor:
    """Compute the hidden states from which the last `count` tokens are predicted, those one position before them.

    Args:
        decoder: a transformers model that returns last_hidden_state.
        input_ids: (B, P + count) int64, prompts padded on the left, then responses padded on the right.
        attention_mask: (B, P + count), 0 on padding.
        count: T >= 1, tokens of a response.
        share: compute rows of the same prompt and the same padding once; not where layers are checkpointed, since they
            keep no keys.

    Returns:
        (B, T, H) in the decoder's dtype.
    """
    before, mask = input_ids[:, :-1], attention_mask[:, :-1]  # no token is predicted from the last one
    prompt = input_ids.shape[1] - count
    share = share and not (decoder.training and getattr(decoder, "is_gradient_checkpointing", False))
    prompts, row = _different(input_ids[:, :prompt], attention_mask[:, :prompt]) if share else (None, None)
    if prompts is None or row is None:
        return decoder(input_ids=before, attention_mask=mask, use_cache=False).last_hidden_state[:, -count:]
    cache = DynamicCache(config=decoder.config)
    arguments = {"past_key_values": cache, "use_cache": True}
    ends = decoder(input_ids=prompts[0], attention_mask=prompts[1], **arguments).last_hidden_state[:, -1:]
    states = ends.index_select(0, row)
    if count == 1:
        return states
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.index_select(0, row), layer.values.index_select(0, row)
    after = decoder(input_ids=before[:, prompt:], attention_mask=mask, **arguments).last_hidden_state
    return torch.cat((states, after), 1)


def _different(ids: Tensor, mask: Tensor) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Return ((ids, mask) of the different rows, index of each row's own among them); None twice if all differ."""
    both, row = torch.cat((ids, mask.to(ids.dtype)), 1).unique(dim=0, return_inverse=True)
    if len(both) == len(ids):
        return None, None
    return (both[:, : ids.shape[1]], both[:, ids.shape[1] :].to(mask.dtype)), row
