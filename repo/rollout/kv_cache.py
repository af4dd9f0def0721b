"""Decoders: the cache of a batch, and the forward pass that adds one token to each of its rows.

A growing cache serves most models on every device. Models without a cache that works read all tokens again at each
step. Decoders in buffers of fixed size, for CUDA graphs, are in graphs/. decoding.py chooses.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..data.sequences import Sequences

CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # names of a model's cache, the newest first


class Decoder(Protocol):
    """A decoder of B = prompts x samples rows. Call `start` once per batch, then `step` for each further token.

    The logits (B, V) that they return stay valid until the next call.
    """

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token.

        prefix: prompts without responses; each is computed once. samples: rows per prompt, which are adjacent.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Append `tokens` (B,) int64, one to each row, and return the logits of the next token."""

    def keep(self, rows: Tensor) -> bool:
        """Drop all rows but `rows` (n,) int64 and return True, or return False if the batch cannot shrink."""


class BufferedLayer(DynamicLayer):
    """A cache layer that reserves room for `extra` tokens and writes them in place, where DynamicLayer copies all."""

    keys: Tensor
    values: Tensor

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, n, dim), and return all keys and values so far."""
        if not self.is_initialized:
            return super().update(key_states, value_states, *args, **kwargs)
        past = self.keys.shape[-2]
        stop = past + key_states.shape[-2]
        if self.room is None or self.room[0].shape[0] != self.keys.shape[0] or self.room[0].shape[-2] < stop:
            self.room = _with_room(self.keys, self.extra), _with_room(self.values, self.extra)
        keys, values = self.room
        keys[..., past:stop, :] = key_states
        values[..., past:stop, :] = value_states
        self.keys, self.values = keys[..., :stop, :], values[..., :stop, :]
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, which may repeat, and leave the room behind."""
        super().reorder_cache(beam_idx)
        self.room = None


def _with_room(states: Tensor, extra: int) -> Tensor:
    """Copy states (B, heads, length, dim) into a new buffer of length + extra columns."""
    batch, heads, length, dim = states.shape
    room = states.new_empty((batch, heads, length + extra, dim))
    room[..., :length, :] = states
    return room


def make_cache(model: Any, extra: int) -> DynamicCache:
    """Make a model's own growing cache, in which layers with full attention reserve room for `extra` tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferedLayer(extra) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cache_argument(model: Any) -> str | None:
    """Return the name of the argument of a model's forward that takes a cache, None if there is none."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in accepted), None)


def read(model: Any, cache: Any, **inputs: Any) -> Tensor:
    """Run the model on inputs (B, n) and return the logits (B, V) after the last column.

    cache: appended to; None for a forward pass without a cache. Inputs that the model does not take are left out.
    """
    accepted = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {**inputs, "use_cache": cache is not None, "logits_to_keep": 1}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        given = {name: value for name, value in given.items() if name in accepted}
    if cache is not None:
        given[cache_argument(model) or "past_key_values"] = cache
    return model(**given).logits[:, -1]


def prefill(model: Any, prefix: Sequences, cache: Any, pads: bool = True) -> Tensor:
    """Run the prompts, write their keys and values into the cache, and return the logits (prompts, V) after each.

    pads: prompts may have different lengths; without it the model gets no attention mask.
    """
    width = prefix.prompt_width
    mask = {"attention_mask": prefix.attention_mask[:, :width].to(torch.int64)} if pads else {}
    inputs = {"input_ids": prefix.input_ids[:, :width], "position_ids": prefix.position_ids[:, :width]}
    return read(model, cache, **inputs, **mask)


class GrowingDecoder:
    """A decoder whose cache grows by one token per step and which can drop finished rows."""

    def __init__(self, model: Any, limit: int, pads: bool = True, selects: bool = True) -> None:
        """limit: largest number of tokens of a response.

        pads: prompts may have different lengths. Without it the model gets no attention mask, which some apply to the
        last token alone.
        selects: rows of the cache can be repeated and dropped. Without it each row computes its own prompt, and
        finished rows stay.
        """
        self.model, self.limit, self.pads, self.selects = model, limit, pads, selects

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token; see Decoder."""
        self.cache = make_cache(self.model, self.limit)
        rows = torch.arange(len(prefix.input_ids), device=prefix.input_ids.device).repeat_interleave(samples)
        if samples > 1 and self.selects:
            logits = self._prefill(prefix)[rows]
            self.cache.reorder_cache(rows)
            prefix = repeated(prefix, rows)
        else:
            prefix = repeated(prefix, rows)
            logits = self._prefill(prefix)
        mask = prefix.attention_mask[:, : prefix.prompt_width]
        self.mask = torch.nn.functional.pad(mask, (0, self.limit), value=True).to(torch.int64)
        self.positions, self.length = prefix.prompt_lengths, prefix.prompt_width
        return logits

    def _prefill(self, prefix: Sequences) -> Tensor:
        """Read the prompts and return the logits (prompts, V) after each."""
        return prefill(self.model, prefix, self.cache, self.pads)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the next one; see Decoder."""
        self.length += 1
        logits = read(
            self.model,
            self.cache,
            input_ids=tokens[:, None],
            position_ids=self.positions[:, None],
            **({"attention_mask": self.mask[:, : self.length]} if self.pads else {}),
        )
        self.positions = self.positions + 1
        return logits

    def keep(self, rows: Tensor) -> bool:
        """Drop all rows but `rows`; return False if the cache cannot shrink."""
        if not self.selects:
            return False
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        return True


def repeated(prefix: Sequences, rows: Tensor) -> Sequences:
    """Select rows (n,) of prompts, which may repeat, without narrowing their rectangle."""
    lengths = prefix.prompt_lengths[rows], prefix.response_lengths[rows]
    return Sequences(prefix.input_ids[rows], *lengths, prefix.prompt_width, prefix.group[rows])


class RereadingDecoder:
    """A decoder without a cache, which reads prompt and response again for each token. Prompts have equal lengths."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token; see Decoder."""
        self.ids = prefix.input_ids[:, : prefix.prompt_width].repeat_interleave(samples, 0)
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the next one; see Decoder."""
        self.ids = torch.cat((self.ids, tokens[:, None]), 1)
        return self._logits()

    def keep(self, rows: Tensor) -> bool:
        """Drop all rows but `rows`."""
        self.ids = self.ids[rows]
        return True

    def _logits(self) -> Tensor:
        """Read all tokens and return the logits (B, V) of the next ones."""
        return read(self.model, None, input_ids=self.ids)
