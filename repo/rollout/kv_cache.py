"""Decoding: the KV cache of a batch, and the forward pass that adds one token to each of its rows.

A growing cache serves every model and device. On CUDA, models with full attention in every layer decode in buffers of
fixed size instead, so that a step can be replayed as one CUDA graph.
"""

from __future__ import annotations

import inspect
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..data.sequences import Sequences, make_sequences
from ..models.policy import Policy

COLUMNS = 16  # lengths of fixed buffers are multiples of this, because fast attention kernels need aligned masks
WARM_UP_STEPS = 3  # steps before a CUDA graph is captured
LENGTH_DEPENDENT = ("dynamic", "longrope")  # rope types that read positions on the host, which a graph cannot


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


def _as_cache(model: Any, cache: Any) -> dict[str, Any]:
    """Return the cache as a keyword argument of the model's forward; transformers 5.24 renamed that argument."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def prefill(model: Any, prefix: Sequences, cache: DynamicCache) -> Tensor:
    """Run the prompts, write their keys and values into the cache, and return the logits (prompts, V) after each."""
    width = prefix.prompt_width
    out = model(
        input_ids=prefix.input_ids[:, :width],
        attention_mask=prefix.attention_mask[:, :width].to(torch.int64),
        position_ids=prefix.position_ids[:, :width],
        **_as_cache(model, cache),
        use_cache=True,
        logits_to_keep=1,
    )
    return out.logits[:, -1]


class GrowingDecoder:
    """A decoder whose cache grows by one token per step and which can drop finished rows. It serves every model."""

    def __init__(self, model: Any, limit: int) -> None:
        """limit: largest number of tokens of a response."""
        self.model, self.limit = model, limit

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token; see Decoder."""
        self.cache = make_cache(self.model, self.limit)
        logits = prefill(self.model, prefix, self.cache)
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
        mask = prefix.attention_mask[:, : prefix.prompt_width].repeat_interleave(samples, 0)
        self.mask = torch.nn.functional.pad(mask, (0, self.limit), value=True).to(torch.int64)
        self.positions, self.length = prefix.prompt_lengths.repeat_interleave(samples), prefix.prompt_width
        return logits.repeat_interleave(samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the next one; see Decoder."""
        self.length += 1
        out = self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask[:, : self.length],
            position_ids=self.positions[:, None],
            **_as_cache(self.model, self.cache),
            use_cache=True,
            logits_to_keep=1,
        )
        self.positions = self.positions + 1
        return out.logits[:, -1]

    def keep(self, rows: Tensor) -> bool:
        """Drop all rows but `rows`; return False if a layer's cache cannot shrink."""
        if not all(isinstance(layer, DynamicLayer) for layer in self.cache.layers):
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        return True


class StaticLayer(DynamicLayer):
    """A cache layer with keys and values in buffers (rows, heads, length, dim) of fixed size.

    transformers' StaticLayer requires one dtype for keys and values, which may differ under autocast.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        """keys, values: the buffers. column: (1,) int64, the column that the next step writes, shared by all layers."""
        super().__init__()
        self.keys, self.values, self.column, self.is_initialized = keys, values, column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values (rows, heads, 1, dim) into the current column, and return the whole buffers."""
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values


class StaticDecoder:
    """A decoder in buffers of fixed size, which every batch reuses; a mask says which columns a row attends to.

    A batch of fewer rows leaves the last ones idle.
    """

    def __init__(self, model: Any, rows: int, length: int, captures: bool) -> None:
        """Allocate the inputs and the mask.

        rows: largest number of rows of a batch. length: largest number of tokens of a prompt and its response together.
        captures: record the step as a CUDA graph at the first start, and replay it for every batch. The weights must
        then stay at their addresses while the decoder is in use, so that each rollout makes a new decoder.
        """
        self.model, self.rows, self.length, self.captures = model, rows, -(-length // COLUMNS) * COLUMNS, captures
        self.graph: torch.cuda.CUDAGraph | None = None
        self.cache: DynamicCache | None = None
        device = model.device
        autocast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else model.dtype
        self.tokens, self.positions = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.mask = torch.zeros((rows, 1, 1, self.length), dtype=self.dtype, device=device)

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token; see Decoder."""
        prompts = DynamicCache(config=self.model.config)
        logits = prefill(self.model, prefix, prompts)
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
            self.cache.layers = [self._layer(layer.keys, layer.values) for layer in prompts.layers]
        if self.captures and self.graph is None:
            self._capture()  # before the prompts are copied in, since capturing writes into columns they may reach
        self.count = len(logits) * samples
        for layer, prompt in zip(self.cache.layers, prompts.layers, strict=True):
            for buffer, states in ((layer.keys, prompt.keys), (layer.values, prompt.values)):
                buffer[: self.count, :, : prefix.prompt_width] = states.repeat_interleave(samples, 0)
        self.mask.fill_(torch.finfo(self.dtype).min)
        visible = prefix.attention_mask[:, : prefix.prompt_width].repeat_interleave(samples, 0)
        self.mask[: self.count, 0, 0, : prefix.prompt_width].masked_fill_(visible, 0)
        self.positions.zero_()  # else idle rows would count on beyond the model's last position
        self.positions[: self.count] = prefix.prompt_lengths.repeat_interleave(samples)
        self.column.fill_(prefix.prompt_width)
        return logits.repeat_interleave(samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the next one; see Decoder."""
        self.tokens[: self.count] = tokens
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.logits[: self.count]

    def keep(self, rows: Tensor) -> bool:
        """Return False: the buffers have a fixed size."""
        return False

    def _layer(self, keys: Tensor, values: Tensor) -> StaticLayer:
        """Allocate the buffers of one layer, with the heads and dims of `keys` and `values`."""

        def buffer(x: Tensor) -> Tensor:
            return x.new_zeros((self.rows, x.shape[1], self.length, x.shape[3]), dtype=self.dtype)

        return StaticLayer(buffer(keys), buffer(values), self.column)

    def _step(self) -> None:
        """Run one step on the buffers: `tokens` in, `logits` out, and positions and column moved on."""
        self.mask.index_fill_(3, self.column, 0)
        out = self.model(
            input_ids=self.tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.positions[:, None],
            **_as_cache(self.model, self.cache),
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = out.logits[:, -1]
        self.positions += 1
        self.column += 1

    def _warm_up(self) -> None:
        """Run steps on the last columns, in which libraries choose kernels and workspaces before the capture."""
        self.column.fill_(self.length - WARM_UP_STEPS)
        for _ in range(WARM_UP_STEPS):
            self._step()

    def _capture(self) -> None:
        """Record the step as a CUDA graph, after a warm-up on a stream of its own."""
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # the graph would use cached casts after autocast has freed them
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._warm_up()
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._step()
        finally:
            torch.set_autocast_cache_enabled(cached)


def make_decoder(policy: Policy, rows: int, width: int, limit: int) -> Decoder:
    """Make a decoder for batches of at most `rows` rows, prompts of at most `width` tokens and responses of `limit`."""
    if policy.device.type == "cuda" and not _why_growing(policy):
        return StaticDecoder(policy.model, rows, width + limit, captures=True)
    return GrowingDecoder(policy.model, limit)


def describe_decoding(policy: Policy) -> str:
    """Describe in one line how responses are decoded, and on CUDA why not by a CUDA graph."""
    if policy.device.type != "cuda":
        return "decoding: token by token, growing KV cache"
    with policy.running():
        why = _why_growing(policy)
    return f"decoding: growing KV cache ({why})" if why else "decoding: CUDA graph over a static KV cache"


_why_growing_by_model: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _why_growing(policy: Policy) -> str:
    """Return the reason why a model needs a growing cache, "" if it does not. The answer is kept for each model."""
    model = policy.model
    if model not in _why_growing_by_model:
        if not getattr(model, "_can_compile_fullgraph", False):
            why = "the model's step has no fixed shape"
        elif any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
            why = "not every layer has full attention"
        elif any(getattr(m, "rope_type", "") in LENGTH_DEPENDENT for m in model.modules()):
            why = "its rotary embedding looks at the length"
        else:
            why = "" if decodes_in_buffers(policy) else "the model does not take a 4-D mask"
        _why_growing_by_model[model] = why
    return _why_growing_by_model[model]


@torch.no_grad()
def decodes_in_buffers(policy: Policy) -> bool:
    """Tell by a trial whether fixed buffers with a 4-D mask give the same logits as a growing cache.

    They do not for models that compute distances from a 2-D mask, which no config field shows.
    """
    prefix = make_sequences([[5, 6, 7, 8, 9], [8, 4, 9]], [[], []], policy.pad_id).to(policy.device)
    tokens = torch.tensor([5, 9, 6, 7], device=policy.device)
    growing, static = GrowingDecoder(policy.model, 3), StaticDecoder(policy.model, 4, 8, captures=False)
    expected, got = growing.start(prefix, 2), static.start(prefix, 2)
    for _ in range(2):
        try:
            expected, got = growing.step(tokens), static.step(tokens)
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
    tolerance = 1e-4 if expected.dtype == torch.float32 else 0.05
    return bool((expected - got).abs().max() < tolerance * expected.float().abs().max())
