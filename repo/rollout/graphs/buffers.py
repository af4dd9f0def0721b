"""The static cache of a batch and the inputs of a step, in buffers that keep their addresses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

COLUMNS = 128  # lengths are multiples of this, so that prompts of another width rarely need other buffers
SPARE = 4  # columns after the last one of a batch, which a capture and the steps before it write


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


class Buffers:
    """The buffers of at most `rows` rows of at most `length` tokens. A batch uses the first rows.

    Row i sees the columns from starts[i] to the current one; an idle row starts after the last column.

    Args:
        rows, length: sizes.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(self, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.length = rows, -(-(length + SPARE) // COLUMNS) * COLUMNS
        self.dtype = dtype
        self.tokens, self.positions, self.starts = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = []

    @property
    def capacity(self) -> int:
        """Return the largest number of tokens of a row."""
        return self.length - SPARE

    @property
    def bytes(self) -> int:
        """Return the memory of keys and values."""
        return sum(x.nbytes for pair in self.layers for x in pair)

    def first(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of the first rows of each layer."""
        return [(keys[:rows], values[:rows]) for keys, values in self.layers]

    def cache(self, model: Any, rows: int) -> DynamicCache:
        """Return the first rows as a cache that transformers' models take."""
        cache = DynamicCache(config=model.config)
        cache.layers = [StaticLayer(keys, values, self.column) for keys, values in self.first(rows)]
        return cache

    def begin(self, prompts: Iterable[Any], lengths: Tensor, width: int, samples: int) -> None:
        """Write the prompts of a batch into the first rows.

        Args:
            prompts: cache layers with keys and values (prompts, heads, width, dim), padded on the left.
            lengths: (prompts,) int64, tokens of each prompt.
            width: of the longest.
            samples: rows per prompt, which are adjacent.
        """
        prompts = list(prompts)
        if not self.layers:
            self.layers = [(self._buffer(layer.keys), self._buffer(layer.values)) for layer in prompts]
        count = len(lengths) * samples
        for pair, layer in zip(self.layers, prompts, strict=True):
            for buffer, states in zip(pair, (layer.keys, layer.values), strict=True):
                buffer[:count, :, :width] = states.repeat_interleave(samples, 0)
        self.positions[:count] = lengths.repeat_interleave(samples)
        self.starts[:count] = width - self.positions[:count]
        self.idle(count)
        self.column.fill_(width)

    def _buffer(self, states: Tensor) -> Tensor:
        """Allocate a buffer with the heads and dims of `states`."""
        shape = self.rows, states.shape[1], self.length, states.shape[3]
        return states.new_zeros(shape, dtype=self.dtype)

    def idle(self, count: int) -> None:
        """Make all rows from `count` on see nothing; their positions count on from 0."""
        self.positions[count:] = 0
        self.starts[count:] = self.length

    def move(self, rows: Tensor, columns: int) -> None:
        """Move `rows` (n,) to the front, of which so many columns are in use; the others become idle."""
        count = len(rows)
        for pair in self.layers:
            for buffer in pair:
                buffer[:count, :, :columns] = buffer[rows, :, :columns]
        for values in (self.tokens, self.positions, self.starts):
            values[:count] = values[rows]
        self.idle(count)
