"""Segments: which tokens of a packed row attend to which, as bounds for a varlen kernel and as masks for SDPA."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Run(NamedTuple):
    """`number` adjacent segments of `queries` tokens each, which see `keys` tokens each."""

    number: int
    queries: int
    keys: int


@dataclass(frozen=True, eq=False)
class Segments:
    """Which tokens of a packed row attend to which. The S segments of queries tile its T tokens.

    cu_q, cu_k: (S + 1,) int32, bounds of each segment's queries and keys. keys: (K,) int64, the token that each key
    is, segment after segment; None where they are the queries' own tokens. Attention is causal, with a segment's last
    query aligned to its last key. On the host: the longest lengths, and the runs of equal adjacent segments.
    """

    cu_q: Tensor
    cu_k: Tensor
    keys: Tensor | None
    max_q: int
    max_k: int
    runs: tuple[Run, ...]
    masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Segments:
        """The same on a device; the copies do not wait."""
        keys = None if self.keys is None else send(self.keys, device)
        return dataclasses.replace(
            self, cu_q=send(self.cu_q, device), cu_k=send(self.cu_k, device), keys=keys, masks={}
        )

    def mask(self, run: Run, window: int | None, like: Tensor) -> Tensor | None:
        """(Lq, Lk) additive, made once for all layers; None where plain causal attention, Lq = Lk, is meant."""
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
    """Segments of given lengths, end to end; each also sees the prefix_length tokens at prefix_start, which may be 0.

    All (S,) int64 on the CPU, every length at least 1.
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
    """The integers of each [start, start + length), one range after another; all int64."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def bounds(lengths: Tensor) -> Tensor:
    """(n,) lengths -> (n + 1,) int32 cumulative bounds, from 0."""
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def send(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the copy to a GPU does not wait, for which it goes through page-locked memory."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension, where an index may come again, by the one of PyTorch's two ways whose
    backward adds in a fixed order on the device."""
    return x[index] if x.is_cuda else x.index_select(0, index)
