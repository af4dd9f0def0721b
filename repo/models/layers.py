"""Decoder layers: compile them, run them uncompiled, or recompute their activations in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shape_config
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from repo_kernels.layers.forwards import replaced_forwards

from ..attention.packed import recompute_contexts
from ..common.errors import UserError

Forward = Callable[..., Any]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """List the decoder layers of a model: those that transformers marks as layers for gradient checkpointing."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


def compile_layers(model: nn.Module, backend: str = "inductor") -> int:
    """Make each decoder layer compile at its next call, for any number of tokens; returns the number of layers.

    One graph serves all layers, since they differ in their weights only. Modules and state_dict names do not change.
    backend: of torch.compile. Raises UserError if the model has no decoder layers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise UserError(f"model.compile must be false: {type(model).__name__} has no decoder layers to compile")
    # by default sizes that are equal in the first call must be equal in all: a row as long as a head is wide would
    # compile anew for every other length
    shape_config.use_duck_shape = False
    # a layer has a graph for each combination of: with gradient or not, of its input too, adapters on or off, prompts
    # shared or not, its window; the default of 8 would leave the last ones uncompiled
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)
    return len(layers)


def uncompile_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    for layer in decoder_layers(model):
        layer.__dict__.pop("forward", None)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Recompute the decoder layers' activations in the backward pass, while the context is open.

    transformers' own gradient checkpointing needs train mode, which turns dropout on; this works in eval mode. It wraps
    compiled layers from outside, because inside it would break their graph.
    """
    contexts = partial(recompute_contexts, model)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    with replaced_forwards({m: partial(checkpoint, m.forward, **options) for m in decoder_layers(model)}):
        yield


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled layers without compilation while the context is open, since decoding would compile them anew."""
    forwards = {m: getattr(m.forward, "_torchdynamo_orig_callable", m.forward) for m in decoder_layers(model)}
    with replaced_forwards(forwards):
        yield
