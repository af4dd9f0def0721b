"""How the forward of a model's decoder layers runs: as it is, compiled, or again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ..common.errors import UserError
from .attention import recompute_contexts

Forward = Callable[..., Any]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers itself can recompute."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Compile each decoder layer, for any number of tokens, at its next call; returns how many there are.

    One graph serves all, since they differ in their weights only; modules and state_dict names stay. backend:
    torch.compile's. UserError for a model without such layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"model.compile must be false: {type(model).__name__} has no layers that it could compile")
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    return len(layers)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing in eval mode; transformers' own needs train mode, hence dropout.

    It is outside what is compiled, where it would break the graph.
    """
    contexts = partial(recompute_contexts, model)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    with _forwards(model, lambda layer: partial(checkpoint, layer.forward, **options)):
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled layers run as they are: a decode step with its cache would compile anew."""
    with _forwards(model, lambda layer: getattr(layer.forward, "_torchdynamo_orig_callable", layer.forward)):
        yield


@contextmanager
def _forwards(model: nn.Module, forward_of: Callable[[Any], Forward]) -> Iterator[None]:
    layers = decoder_layers(model)
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward_of(layer)
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward
