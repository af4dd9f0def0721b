"""Twin: a copy of a model's trunk on "meta", which takes no memory, with one decoder layer of each kind."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layers import decoder_layers, uncompiled
from ..models.lm_head import trunk_of


@dataclass(frozen=True)
class Kind:
    """A kind of decoder layer: those with parameters of the same names, shapes and dtypes.

    trunk: a copy of the trunk on "meta" whose only layer is of this kind. head: the weight of the LM head, which may be
    the trunk's embedding; None for a model without one. weights: parameters of the layer. count: number of such layers
    in the model.
    """

    trunk: Any
    head: Tensor | None
    weights: int
    count: int


def kinds_of(model: nn.Module) -> list[Kind]:
    """Make a twin for each kind of decoder layer of a causal LM or a trunk, on any device. Compiled layers are copied
    uncompiled.

    Raises ValueError if the decoder layers are not all in one list.
    """
    trunk = trunk_of(model)
    lists = [m for m in trunk.modules() if isinstance(m, nn.ModuleList) and set(m) & set(decoder_layers(trunk))]
    if len(lists) != 1:
        raise ValueError(f"{type(trunk).__name__} has no single list of decoder layers")
    layers = lists[0]
    signatures = [_signature(layer) for layer in layers]
    head = None if trunk is model else model.get_output_embeddings().weight
    with uncompiled(trunk):
        kinds = []
        for signature, count in Counter(signatures).items():
            layer = layers[signatures.index(signature)]
            weights = sum(p.numel() for p in layer.parameters())
            kinds.append(Kind(*_copy(trunk, head, layers, layer), weights, count))
    return kinds


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """Describe what the memory of a layer depends on, as far as its parameters show it."""
    parameters = ((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
    return type(layer), *parameters


def _copy(trunk: Any, head: Tensor | None, layers: nn.ModuleList, layer: nn.Module) -> tuple[Any, Tensor | None]:
    """Copy a trunk to "meta", with `layer` in place of all `layers`, and the weight of the head."""
    tensors = [t for module in (trunk, layer) for t in (*module.parameters(), *module.buffers())]
    tensors += [] if head is None else [head]
    memo: dict[int, Any] = {id(t): _on_meta(t) for t in tensors}
    memo[id(layers)] = nn.ModuleList([copy.deepcopy(layer, memo)])
    return copy.deepcopy(trunk, memo).eval(), None if head is None else memo[id(head)]


def _on_meta(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape on "meta", which requires a gradient, and has one, if this one requires it."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, tensor.requires_grad)
    if tensor.requires_grad:
        parameter.grad = torch.empty_like(parameter)
    return parameter
