"""The decoder in static buffers: a CUDA graph for each number of rows, and finished rows that leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from ...data.sequences import Sequences
from ..kv_cache import prefill
from .buffers import SPARE, Buffers

LEAST_ROWS = 8  # of a graph: with fewer rows a step takes as long, since it reads all weights


class Step(Protocol):
    """One way to compute a step; see steps.py."""

    name: str

    def __call__(self, buffers: Buffers, rows: int) -> Tensor:
        """Return the logits (rows, V) after the first rows' tokens."""


class Graphs:
    """The captured steps by their number of rows, in one pool of memory."""

    def __init__(self) -> None:
        self.by_rows: dict[int, tuple[Callable[[], None], Tensor]] = {}
        self._pool: Any = None

    def capture(self, rows: int, step: Callable[[], Tensor]) -> None:
        """Record a step as a CUDA graph. Its output stays alive, so that no other graph of the pool overwrites it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = step()
        self._pool = graph.pool()
        self.by_rows[rows] = graph.replay, logits


def bucket(rows: int, most: int) -> int:
    """Return the number of rows of the graph for a batch: a power of two, or 3/4 of one, from LEAST_ROWS to `most`."""
    size = LEAST_ROWS
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, most)


class StaticDecoder:
    """A decoder in buffers of fixed size, which every batch reuses; see Decoder."""

    def __init__(self, model: Any, step: Step, buffers: Buffers, graphs: Graphs | None) -> None:
        """Decode with `step` in `buffers`.

        graphs: of this step in these buffers, to which missing ones are added; None to compute every step anew. The
        tensors that a step reads must stay at their addresses.
        """
        self.model, self.step_of, self.buffers, self.graphs = model, step, buffers, graphs
        self.count = self.rows = self.columns = 0

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token; see Decoder."""
        prompts = DynamicCache(config=self.model.config)
        logits = prefill(self.model, prefix, prompts)
        self.buffers.begin(prompts.layers, prefix.prompt_lengths, prefix.prompt_width, samples)
        self.columns = prefix.prompt_width
        self._take(len(logits) * samples)
        return logits.repeat_interleave(samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the next one; see Decoder."""
        self.buffers.tokens[: self.count] = tokens
        self.columns += 1
        if self.graphs is None:
            return self._step()[: self.count]
        replay, logits = self.graphs.by_rows[self.rows]
        replay()
        return logits[: self.count]

    def keep(self, rows: Tensor) -> bool:
        """Move `rows` to the front if they fit the graph of fewer rows; return False if they do not."""
        if bucket(len(rows), self.buffers.rows) >= self.rows:
            return False
        self.buffers.move(rows, self.columns)
        self._take(len(rows))
        return True

    def _take(self, count: int) -> None:
        """Use the graph for so many rows; capture it if there is none."""
        self.count, self.rows = count, bucket(count, self.buffers.rows)
        if self.graphs is not None and self.rows not in self.graphs.by_rows:
            self._capture(self.graphs)

    def _step(self) -> Tensor:
        """Compute one step of the rows in use: tokens in, logits out, and positions and column moved on."""
        logits = self.step_of(self.buffers, self.rows)
        self.buffers.positions[: self.rows] += 1
        self.buffers.column += 1
        return logits

    def _capture(self, graphs: Graphs) -> None:
        """Record the step for the rows in use, after a warm-up. Both write spare columns, and leave no trace."""
        state = self.buffers.column, self.buffers.positions
        before = [x.clone() for x in state]
        self.buffers.column.fill_(self.buffers.capacity)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # the graph would use cached casts after autocast has freed them
        try:
            self._warm_up(1 if graphs.by_rows else SPARE - 1)
            graphs.capture(self.rows, self._step)
        finally:
            torch.set_autocast_cache_enabled(cached)
        for x, y in zip(state, before, strict=True):
            x.copy_(y)

    def _warm_up(self, steps: int) -> None:
        """Take steps on a stream of its own, in which libraries choose kernels and workspaces before the capture."""
        device = self.buffers.column.device
        if device.type != "cuda":
            for _ in range(steps):
                self._step()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(steps):
                self._step()
        torch.cuda.current_stream(device).wait_stream(stream)
