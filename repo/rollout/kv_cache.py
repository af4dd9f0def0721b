"""Decoding: the KV cache of a batch, and the forward pass that adds a token to each of its rows.

A growing cache serves every model and device. On CUDA models of full attention decode in buffers of fixed size, so that
a step is one CUDA graph.
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

COLUMNS = 16  # lengths of fixed buffers are multiples of this, as fast attention kernels want masks aligned
WARM_UP_STEPS = 3
LENGTH_DEPENDENT = ("dynamic", "longrope")  # these rotary embeddings read positions on the host


class Decoder(Protocol):
    """start, then step after step; logits are (B, V) for B = prompts x samples and hold until the next call."""

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Logits of the first token. prefix: prompts without responses, each computed once for its samples."""

    def step(self, tokens: Tensor) -> Tensor:
        """Logits of the token after `tokens` (B,)."""

    def keep(self, rows: Tensor) -> bool:
        """Go on with `rows` (n,) of the B alone, or return False where the batch cannot shrink."""


class BufferedLayer(DynamicLayer):
    """A cache layer with room for `extra` tokens, which it writes in place where DynamicLayer copies everything."""

    keys: Tensor
    values: Tensor

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, heads, n, dim) keys and values; returns all so far."""
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
    batch, heads, length, dim = states.shape
    room = states.new_empty((batch, heads, length + extra, dim))
    room[..., :length, :] = states
    return room


def make_cache(model: Any, extra: int) -> DynamicCache:
    """The model's own cache, with its plain layers buffered (sliding-window and other layers keep their own kind)."""
    cache = DynamicCache(config=model.config)
    cache.layers = [BufferedLayer(extra) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _as_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The cache as an argument of the model's forward, which transformers 5.24 gave another name."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


def prefill(model: Any, prefix: Sequences, cache: DynamicCache) -> Tensor:
    """(prompts, V) logits after each prompt, whose keys and values go into the cache."""
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
    """A cache that grows by a token per step, up to `limit`, and whose finished rows can leave."""

    def __init__(self, model: Any, limit: int) -> None:
        self.model, self.limit = model, limit

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """See Decoder."""
        self.cache = make_cache(self.model, self.limit)
        logits = prefill(self.model, prefix, self.cache)
        if samples > 1:
            self.cache.batch_repeat_interleave(samples)
        mask = prefix.attention_mask[:, : prefix.prompt_width].repeat_interleave(samples, 0)
        self.mask = torch.nn.functional.pad(mask, (0, self.limit), value=True).to(torch.int64)
        self.positions, self.length = prefix.prompt_lengths.repeat_interleave(samples), prefix.prompt_width
        return logits.repeat_interleave(samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """See Decoder."""
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
        """See Decoder."""
        if not all(isinstance(layer, DynamicLayer) for layer in self.cache.layers):
            return False
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        return True


class StaticLayer(DynamicLayer):
    """Keys and values in (rows, heads, length, dim) buffers; a step writes them into the column of all layers.

    transformers' StaticLayer gives keys and values one dtype, which they do not have under autocast.
    """

    def __init__(self, keys: Tensor, values: Tensor, column: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.column, self.is_initialized = keys, values, column, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, 1, dim) keys and values; returns the whole buffers."""
        self.keys.index_copy_(2, self.column, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.column, value_states.to(self.values.dtype))
        return self.keys, self.values


class StaticDecoder:
    """`rows` rows of `length` columns in buffers that every batch reuses; what a row may see is in a mask.

    captures: the step is recorded as a CUDA graph at the first start and replayed for every batch of this decoder, so
    the weights must stay where they are while it is in use. Each rollout builds a decoder and records once. A batch of
    fewer rows leaves the last ones idle.
    """

    def __init__(self, model: Any, rows: int, length: int, captures: bool) -> None:
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
        """See Decoder."""
        found = DynamicCache(config=self.model.config)
        logits = prefill(self.model, prefix, found)
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config)
            self.cache.layers = [self._layer(layer.keys, layer.values) for layer in found.layers]
        if self.captures and self.graph is None:
            self._capture()  # before the prompts come in: it writes into columns that they may reach
        self.count = len(logits) * samples
        for mine, given in zip(self.cache.layers, found.layers, strict=True):
            for buffer, states in ((mine.keys, given.keys), (mine.values, given.values)):
                buffer[: self.count, :, : prefix.prompt_width] = states.repeat_interleave(samples, 0)
        self.mask.fill_(torch.finfo(self.dtype).min)
        visible = prefix.attention_mask[:, : prefix.prompt_width].repeat_interleave(samples, 0)
        self.mask[: self.count, 0, 0, : prefix.prompt_width].masked_fill_(visible, 0)
        self.positions.zero_()  # idle rows would count on beyond the model's positions
        self.positions[: self.count] = prefix.prompt_lengths.repeat_interleave(samples)
        self.column.fill_(prefix.prompt_width)
        return logits.repeat_interleave(samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """See Decoder."""
        self.tokens[: self.count] = tokens
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self.logits[: self.count]

    def keep(self, rows: Tensor) -> bool:
        """The buffers keep their size."""
        return False

    def _layer(self, keys: Tensor, values: Tensor) -> StaticLayer:
        def buffer(x: Tensor) -> Tensor:
            return x.new_zeros((self.rows, x.shape[1], self.length, x.shape[3]), dtype=self.dtype)

        return StaticLayer(buffer(keys), buffer(values), self.column)

    def _step(self) -> None:
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
        """The steps that come before a capture, which chooses kernels and workspaces, write into the last columns."""
        self.column.fill_(self.length - WARM_UP_STEPS)
        for _ in range(WARM_UP_STEPS):
            self._step()

    def _capture(self) -> None:
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # its copies would die with the context and live on in the graph
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
    """What decodes batches of up to `rows` rows with prompts of up to `width` tokens and `limit` new ones."""
    if policy.device.type == "cuda" and not _why_growing(policy):
        return StaticDecoder(policy.model, rows, width + limit, captures=True)
    return GrowingDecoder(policy.model, limit)


def describe_decoding(policy: Policy) -> str:
    """One line: how responses are decoded, and why not by CUDA graph on CUDA."""
    if policy.device.type != "cuda":
        return "decoding: token by token, growing KV cache"
    with policy.running():
        why = _why_growing(policy)
    return f"decoding: growing KV cache ({why})" if why else "decoding: CUDA graph over a static KV cache"


_static_by_model: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _why_growing(policy: Policy) -> str:
    """Why this model's cache must grow, "" where it need not; found out once per model."""
    model = policy.model
    if model not in _static_by_model:
        if not getattr(model, "_can_compile_fullgraph", False):
            why = "the model's step has no fixed shape"
        elif any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
            why = "not every layer has full attention"
        elif any(getattr(m, "rope_type", "") in LENGTH_DEPENDENT for m in model.modules()):
            why = "its rotary embedding looks at the length"
        else:
            why = "" if decodes_in_buffers(policy) else "the model does not take a 4-D mask"
        _static_by_model[model] = why
    return _static_by_model[model]


@torch.no_grad()
def decodes_in_buffers(policy: Policy) -> bool:
    """Whether buffers with a mask give the logits of a growing cache, by trying it: no config field tells that a model
    reads distances from its 2-D mask."""
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
