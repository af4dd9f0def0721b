"""Copies of linear weights for decoding, at addresses that stay, so that CUDA graphs of them outlive an update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


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
        copies: list[Tensor] = []
        originals: list[Tensor] = []
        for name, pair in self.copies.items():
            layer = model.get_submodule(name)
            for copy, original in zip(pair, (layer.weight, layer.bias), strict=True):
                if copy is not None:
                    copies.append(copy)
                    originals.append(original)
        if copies:
            torch._foreach_copy_(copies, originals)

    @contextmanager
    def linears(self, model: nn.Module) -> Iterator[None]:
        """Open the context in which the layers multiply by their copies."""
        layers = {name: model.get_submodule(name) for name in self.copies}
        try:
            for name, layer in layers.items():
                weight, bias = self.copies[name]
                layer.forward = partial(linear, weight=weight, bias=bias)  # type: ignore[method-assign]
            yield
        finally:
            for layer in layers.values():
                layer.__dict__.pop("forward", None)
