"""Attention over packed rows: a function for transformers' models. Which models use it is decided in layout.py.

Every sequence of a packed row attends causally to itself alone; a response that shares its prompt also attends to that
prompt. The kernels that compute this are chosen in candidates.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..data.segments import Segments, take_rows
from .candidates import choose_kernel
from .sdpa import Kernel, per_run

IMPLEMENTATION = "repo_packed"
TRACED = "repo_packed_traced"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    windows: dict[int, int | None] | None = None,
    kernel: Kernel | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer over a packed row, with the signature that transformers' models call.

    Args:
        query: (1, Hq, T, D). key, value: (1, Hk, T, D). attention_mask: None.
        segments: which tokens attend to which; passed through the model's keyword arguments.
        scaling: factor of the scores, None for D^-1/2. sliding_window: keys that a query attends to at most, None for
            all. softcap: bound of the scores by softcap * tanh(score / softcap), None for no bound.
        windows: passed through the model's keyword arguments; filled with each layer's sliding_window.
        kernel: passed through the model's keyword arguments; None to choose one by device, dtype and head size.

    Returns:
        (1, T, Hq, D) in the dtype of autocast, or else of `value`; and None in place of attention weights.

    Raises:
        ValueError: segments are missing, a mask is given, or dropout is not 0.
    """
    if segments is None:
        raise ValueError("segments must be given to packed attention through the model's arguments; got None")
    if attention_mask is not None:
        raise ValueError(
            "attention_mask must be None in packed attention, which does not add what the model puts in it"
        )
    if dropout:
        raise ValueError(f"dropout must be 0 in packed attention; got {dropout}; put the model in eval mode")
    if windows is not None:
        windows[getattr(module, "layer_idx", len(windows))] = sliding_window
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if segments.keys is not None:
        k, v = take_rows(k, segments.keys), take_rows(v, segments.keys)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if kernel is None:
        equal = q.shape[-1] == v.shape[-1]  # SDPA alone takes heads of values that differ from those of queries
        capped, windowed = softcap is not None, sliding_window is not None
        kernel = choose_kernel(query.device, dtype, q.shape[-1], capped, windowed).kernel if equal else per_run
    return kernel(q, k, v, segments, scale, sliding_window, softcap)[None], None


# Kernels are chosen by trials, and most are no operators that torch.compile knows: it must not look into them. Under
# the second name it does, and has the attention in the graph of the layer; `kernel` must then be given and traceable.
AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(packed_attention))
AttentionInterface.register(TRACED, packed_attention)


def using_packed(model: Any, traced: bool = False) -> AbstractContextManager[None]:
    """Return a context in which the model's layers use `packed_attention`; its forward then takes `segments=`, no mask.

    Layers read the name of the attention function from the config when they run, so that layers that are recomputed in
    the backward pass need `recompute_contexts` too. traced: let torch.compile look into it; needs `kernel=`.
    """
    return using_attention(model, TRACED if traced else IMPLEMENTATION)


def using_attention(model: Any, name: str) -> AbstractContextManager[None]:
    """Return a context in which the model's layers use the attention function of this name."""
    return _Implementation(model, [name, name])


def recompute_contexts(model: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of forward and recomputation for torch.utils.checkpoint's context_fn.

    Layers are recomputed with the attention function that they have when this is called, in the forward pass.
    """
    return nullcontext(), _Implementation(model, [config._attn_implementation for config in _configs(model)])


class _Implementation(AbstractContextManager[None]):
    """A context that sets the name of the attention function in a model's configs. It can be reused and nested."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self.model, self.names = model, names
        self.before: list[list[str]] = []

    def __enter__(self) -> None:
        self.before.append([config._attn_implementation for config in _configs(self.model)])
        self._set(self.names)

    def __exit__(self, *_: object) -> None:
        self._set(self.before.pop())

    def _set(self, names: list[str]) -> None:
        for config, name in zip(_configs(self.model), names, strict=True):
            config._attn_implementation_internal = name  # the public setter would change a vision tower's config too


def _configs(model: Any) -> list[Any]:
    """List the model's config and its text config, which are often the same object."""
    return [model.config, model.config.get_text_config()]
