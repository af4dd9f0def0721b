"""Copies of linear weights for decoding, at addresses that stay, so that CUDA graphs of them outlive an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from repo_kernels.layers.forwards import replaced_forwards


class DecodeWeights:
    """Copies of the weights of a model's nn.Linear layers, each in buffers that `refresh` fills again.

    A layer has a copy if it is joined with others, or if its dtype is not that of the forward pass. The copies do not
    keep the model alive.

    Args:
        model: the model.
        cast: dtype of the forward pass under autocast, which the copies get; None to keep the dtype of each weight.
        joined: layers of equal inputs whose weights lie one after the other in one buffer.
    """

    def __init__(self, model: nn.Module, cast: torch.dtype | None, joined: Sequence[Sequence[nn.Linear]] = ()) -> None:
        names = {module: name for name, module in model.named_modules() if type(module) is nn.Linear}
        self.whole: list[tuple[Tensor, Tensor | None]] = []
        self.copies: dict[str, tuple[Tensor, Tensor | None]] = {}
        together = {module for group in joined for module in group}
        alone = [[m] for m in names if m not in together and cast not in (None, m.weight.dtype)]
        for group in (*joined, *alone):
            rows = [m.out_features for m in group]
            dtype = cast or group[0].weight.dtype
            weight = group[0].weight.new_empty(sum(rows), group[0].in_features, dtype=dtype)
            bias = None if group[0].bias is None else weight.new_empty(sum(rows))
            parts = weight.split(rows), [None] * len(rows) if bias is None else bias.split(rows)
            self.copies |= {names[m]: pair for m, pair in zip(group, zip(*parts, strict=True), strict=True)}
            self.whole.append((weight, bias))
        self.refresh(model)

    @property
    def bytes(self) -> int:
        """Return the memory of the copies."""
        return sum(x.nbytes for pair in self.whole for x in pair if x is not None)

    def of(self, model: nn.Module, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias of a layer: its copies, or its own where it has none."""
        name = next(name for name, module in model.named_modules() if module is layer)
        own = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        return self.copies.get(name, own)

    @torch.no_grad()
    def refresh(self, model: nn.Module) -> None:
        """Copy the present weights of the model."""
        for name, (weight, bias) in self.copies.items():
            layer: Any = model.get_submodule(name)
            weight.copy_(layer.weight)
            if bias is not None:
                bias.copy_(layer.bias)

    @contextmanager
    def linears(self, model: nn.Module) -> Iterator[None]:
        """Open the context in which the layers multiply by their copies."""
        copies = ((model.get_submodule(name), *pair) for name, pair in self.copies.items())
        with replaced_forwards({layer: partial(linear, weight=w, bias=bias) for layer, w, bias in copies}):
            yield
