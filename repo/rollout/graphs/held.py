"""What is kept from one rollout to the next: the static cache, the copies of the weights and the graphs.

A graph reads and writes fixed addresses. It stays valid while the model's parameters lie where they lay, and the copies
of the weights are filled again at the begin of each rollout. Kept are
- keys and values: 2 * layers * rows * length * key heads * D numbers;
- a copy of every linear weight in the dtype of autocast, or, without autocast, of the queries, keys, values, gate and
  up of fused layers;
- the logits and intermediate results of one step for each graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...models.policy import Policy
from .buffers import Buffers
from .choice import choose_step, compute_dtype, make_step, make_weights
from .decoder import Graphs, StaticDecoder
from .weights import DecodeWeights

KEPT_SHARE = 1 / 16  # of the device's memory that cache and copies may take between rollouts


@dataclass
class Held:
    """What is kept for a model. addresses: of what the graphs were captured with."""

    buffers: Buffers
    weights: DecodeWeights
    graphs: Graphs
    addresses: tuple[object, ...]

    @property
    def bytes(self) -> int:
        """Return the memory of the cache and of the copies."""
        return self.buffers.bytes + self.weights.bytes


_held: WeakKeyDictionary[nn.Module, Held] = WeakKeyDictionary()


@contextmanager
def graph_decoder(
    policy: Policy, rows: int, width: int, limit: int, make_graphs: Callable[[], Graphs] = Graphs
) -> Iterator[StaticDecoder]:
    """Open the context with the static decoder of a model that choose_step accepts; arguments as of running_decoder.

    make_graphs: makes the captured steps of new buffers.
    """
    held = _get(policy, rows, width + limit, make_graphs)
    step = make_step(choose_step(policy).name, policy.model, held.weights)
    with held.weights.linears(policy.model):
        yield StaticDecoder(policy.model, step, held.buffers, held.graphs)
    if held.bytes > _most(policy.device):
        release(policy.model)


def release(model: nn.Module) -> None:
    """Free what is kept for a model."""
    _held.pop(model, None)


def _get(policy: Policy, rows: int, length: int, make_graphs: Callable[[], Graphs]) -> Held:
    """Return what is kept, with the present weights, or make it anew if it does not fit."""
    model, kind = policy.model, choose_step(policy).name
    addresses = _addresses(policy, kind)
    held = _held.get(model)
    if held is not None and held.addresses == addresses:
        if held.buffers.rows >= rows and held.buffers.capacity >= length:
            held.weights.refresh(model)
            return held
        rows, length = max(rows, held.buffers.rows), max(length, held.buffers.capacity)
    del held
    release(model)  # before the new buffers are allocated
    buffers = Buffers(rows, length, compute_dtype(model), policy.device)
    _held[model] = Held(buffers, make_weights(kind, model), make_graphs(), addresses)
    return _held[model]


def _addresses(policy: Policy, kind: str) -> tuple[object, ...]:
    """Return what must not change while a graph is in use: way, dtypes, adapters, and the addresses of all tensors."""
    model: Any = policy.model
    tensors = [*model.parameters(), *model.buffers()]
    return kind, compute_dtype(model), policy.base_only, *((x.data_ptr(), x.dtype, x.shape) for x in tensors)


def _most(device: torch.device) -> float:
    """Return the bytes that may be kept between rollouts."""
    if device.type != "cuda":
        return float("inf")
    return KEPT_SHARE * torch.cuda.get_device_properties(device).total_memory
