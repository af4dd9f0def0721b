"""Segments: which tokens of a packed row attend to which, as bounds for a varlen kernel or masks for SDPA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Run(NamedTuple):
    """A run of `number` adjacent segments with `queries` tokens each, which attend to `keys` tokens each."""

    number: int
    queries: int
    keys: int


# Not frozen: up to torch 2.11 torch.compile reads every field of a frozen dataclass and compiles anew for other values.
@dataclass(eq=False)
class Segments:
    """The attention pattern of a packed row: S segments of queries tile its T tokens, and each has a range of keys.

    Attention within a segment is causal, with its last query aligned to its last key.

    cu_q, cu_k: (S + 1,) int32, bounds of each segment's queries and keys.
    keys: (K,) int64, the index of each key's token, segment after segment; None where each segment attends to its own
    tokens alone.
    max_q, max_k: largest number of queries and of keys of a segment. runs: the runs of equal adjacent segments.
    masks: masks that `mask` has made, for reuse.
    """

    cu_q: Tensor
    cu_k: Tensor
    keys: Tensor | None
    max_q: int
    max_k: int
    runs: tuple[Run, ...]
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Segments:
        """Copy the segments to a device without waiting for the copies."""
        keys = None if self.keys is None else send(self.keys, device)
        return dataclasses.replace(
            self, cu_q=send(self.cu_q, device), cu_k=send(self.cu_k, device), keys=keys, masks={}
        )

    def mask(self, run: Run, window: int | None, like: Tensor) -> Tensor | None:
        """Return the additive mask (queries, keys) of a run, made once for all layers.

        window: number of keys that a query attends to, itself included; None for all. like: gives dtype and device.
        Returns None where plain causal attention over equal numbers of queries and keys does it.
        """
        window = window if window is not None and window < run.keys else None
        if run.queries == run.keys and window is None:
            return None
        key = (run.queries, run.keys, window, like.dtype)
        if key not in self.masks:
            query = torch.arange(run.keys - run.queries, run.keys, device=like.device)[:, None]
            distance = query - torch.arange(run.keys, device=like.device)
            hidden = (distance < 0) | (distance >= (window or run.keys))
            self.masks[key] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self.masks[key].masked_fill_(hidden, -torch.inf)
        return self.masks[key]


def make_segments(lengths: Tensor, prefix_starts: Tensor, prefix_lengths: Tensor) -> Segments:
    """Make segments that lie end to end; each attends to itself and to a prefix elsewhere in the row.

    lengths: (S,) int64 on the CPU, tokens of each segment, >= 1. prefix_starts, prefix_lengths: (S,) int64 on the CPU,
    the range of each prefix; a length may be 0.
    """
    starts, seen = lengths.cumsum(0) - lengths, lengths + prefix_lengths
    keys = None
    if bool(prefix_lengths.any()):
        keys = ranges(
            torch.stack((prefix_starts, starts), 1).flatten(), torch.stack((prefix_lengths, lengths), 1).flatten()
        )
    runs = tuple(
        Run(len(list(equal)), *sizes) for sizes, equal in groupby(zip(lengths.tolist(), seen.tolist(), strict=True))
    )
    return Segments(bounds(lengths), bounds(seen), keys, int(lengths.max()), int(seen.max()), runs)


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """List the integers of each range [start, start + length), one range after another. All tensors are int64."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def bounds(lengths: Tensor) -> Tensor:
    """Accumulate lengths (n,) into bounds (n + 1,) int32 that start at 0."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def send(value: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. A copy to a GPU goes through page-locked memory, so that the host does not wait."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] along the first dimension, where `index` may repeat.

    Uses the one of PyTorch's two ways whose backward adds in a fixed order on the device, so that results repeat.
    """
    return x[index] if x.is_cuda else x.index_select(0, index)
