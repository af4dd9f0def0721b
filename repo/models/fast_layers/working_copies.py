"""Working copies: half-precision copies of fp32 weights for one optimiser step, whose gradients go to the weights.

Autocast casts each fp32 weight in every forward pass and casts each gradient back before it is added: 24 bytes of
traffic and three kernels per weight and micro-batch. A copy that lives for the whole step leaves the addition alone, 10
bytes and one kernel. The numbers are those of autocast bit for bit: the same rounding of the weights, the same product,
and its gradient added to the fp32 gradient in fp32.

LoRA adapters in fp32 beside a half-precision model have no autocast: each casts its input to fp32 and keeps that for
the backward pass. With copies they compute in the model's dtype, as autocast would let them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import is_sharded


@contextmanager
def working_copies(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Replace the trained fp32 weights of a model's linear layers by copies in `dtype` while the context is open.

    The weights must not change inside. A backward pass inside adds to their `.grad`. The LM head keeps its weight: the
    loss returns its gradient in fp32, and embeddings, which may share it, are read in fp32. Norms do too, and sharded
    weights, which FSDP casts itself.
    """
    places = _places(model)
    masters = list(dict.fromkeys(master for _, _, master in places))
    copies = _copies(masters, dtype)
    try:
        for module, name, master in places:
            module._parameters[name] = copies[master]
        yield
    finally:
        for module, name, master in places:
            module._parameters[name] = master


def _places(model: Any) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """List (layer, name, weight) of the weights to copy."""
    from transformers.pytorch_utils import Conv1D

    embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    kept = {id(p) for module in embeddings if module is not None for p in module.parameters()}
    return [
        (module, name, p)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D))
        for name, p in module.named_parameters(recurse=False)
        if p.requires_grad and p.dtype == torch.float32 and id(p) not in kept and not is_sharded(p)
    ]


@torch.no_grad()
def _copies(masters: list[nn.Parameter], dtype: torch.dtype) -> dict[nn.Parameter, nn.Parameter]:
    """Cast weights, all in few launches, into parameters that hand their gradients over."""
    cast, weights = [torch.empty_like(master, dtype=dtype) for master in masters], list[Tensor](masters)
    if cast:
        torch._foreach_copy_(cast, weights)
    copies = {master: nn.Parameter(copy) for master, copy in zip(masters, cast, strict=True)}
    for master, copy in copies.items():
        copy.register_post_accumulate_grad_hook(partial(_hand_over, master))
    return copies


@torch.no_grad()
def _hand_over(master: nn.Parameter, copy: Tensor) -> None:
    """Add the gradient that a copy has just received to that of its weight, in fp32."""
    gradient, copy.grad = copy.grad, None
    assert gradient is not None
    if master.grad is None:
        master.grad = gradient.to(master.dtype)
    else:
        master.grad.add_(gradient)
