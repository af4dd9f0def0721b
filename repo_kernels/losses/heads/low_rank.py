"""The low-rank part of a head, scaling * B A: its logits and the gradients of A and B, a chunk of rows at a time.

With h (c, H) of a chunk, D = dL/dlogits (c, V) and s = scaling, where B A (V, H) is never formed::

    logits += z B^T,  z = s h A^T        dL/dB = D^T z
    E = s D B                            dL/dA = E^T h        dL/dh += E A

Products over the vocabulary take the factors' dtype. The others are small and take that of the sums, so that an fp32
adapter A is not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm import add_inner, add_thin_product, product


@dataclass(frozen=True)
class LowRank:
    """What LoRA adds to the weight of a head.

    Args:
        a: (r, H), dtype of the sums.
        b: (V, r), dtype of the factors.
        scaling: 0-d, dtype of the sums.
    """

    a: Tensor
    b: Tensor
    scaling: Tensor

    @staticmethod
    def of(*lora: Tensor | None, factors: torch.dtype, result: torch.dtype) -> LowRank | None:
        """Cast lora_A, lora_B and scaling; return None if there are none."""
        present = [x.detach() for x in lora if x is not None]
        if not present:
            return None
        a, b, scaling = present
        return LowRank(a.to(result), b.to(factors), scaling.to(result))

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a.shape[0]

    def inner(self, x: Tensor) -> Tensor:
        """Compute z = s x A^T, (c, r), dtype of the factors, from x (c, H)."""
        z = self.a.new_empty(x.shape[0], self.rank)
        product(x.to(self.a.dtype), self.a.t(), z)
        return z.mul_(self.scaling).to(self.b.dtype)

    def inner_gradient(self, grad: Tensor) -> Tensor:
        """Compute E = s D B, (c, r), dtype of the sums, from D (c, V)."""
        e = self.a.new_empty(grad.shape[0], self.rank)
        product(grad, self.b, e)
        return e.mul_(self.scaling)


@dataclass(frozen=True)
class LowRankGradients:
    """dL/dA (r, H) and dL/dB (V, r), summed over chunks in the sums' dtype; None if not wanted."""

    of: LowRank
    a: Tensor | None
    b: Tensor | None

    @staticmethod
    def zeros(of: LowRank, wanted: Sequence[bool]) -> LowRankGradients:
        """Allocate the wanted ones."""
        a, b = (
            torch.zeros_like(x, dtype=of.a.dtype, memory_format=torch.contiguous_format) if want else None
            for x, want in zip((of.a, of.b), wanted, strict=True)
        )
        return LowRankGradients(of, a, b)

    def add(self, grad: Tensor, x: Tensor, wants_inner: bool) -> Tensor | None:
        """Add a chunk, and return E if the caller wants it. grad: D (c, V); x: (c, H); dtype of the factors."""
        if self.b is not None:
            add_inner(grad, self.of.inner(x), self.b)
        if self.a is None and not wants_inner:
            return None
        inner = self.of.inner_gradient(grad)
        if self.a is not None:
            add_thin_product(inner.t(), x.to(inner.dtype), self.a)
        return inner
