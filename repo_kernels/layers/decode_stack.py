"""Llama-shaped layers for one new token per row over a static cache: matrix products with one kernel between two.

On a GPU a layer takes nine or ten launches: four products, and norms, rotation with the cache's write, attention (and
the join of its parts) and gate in Triton. On the CPU, where it is used in tests, the same in PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from .decode_attention import decode_attention
from .decode_layer import add_norm, gate, place_heads


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer.

    Args:
        input_norm, post_norm: (H,), of the RMSNorms before attention and before the MLP.
        qkv: ((heads + 2 key heads) * D, H); qkv_bias: its bias or None.
        head_norms: (D,) each, of RMSNorms on queries and keys before the rotation, or None.
        out: (H, heads * D); out_bias: (H,) or None.
        gate_up: (2 I, H).
        down: (H, I).
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    head_norms: tuple[Tensor, Tensor] | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


class StaticStack:
    """A model's layers, final norm and head. Nothing is copied: it reads the weights where they are.

    Args:
        layers: at least one; their products have the dtype of the weights.
        norm: (H,), of the final RMSNorm.
        head: (V, H).
        heads: of queries.
        epsilon: of every RMSNorm.
        scale: factor of the attention scores.
        backend: "triton", "eager", or None for Triton on a GPU.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head: Tensor,
        heads: int,
        epsilon: float,
        scale: float,
        backend: str | None = None,
    ) -> None:
        self.layers, self.norm, self.head, self.heads = tuple(layers), norm, head, heads
        self.epsilon, self.scale, self.backend = epsilon, scale, backend

    @torch.no_grad()
    def step(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Sequence[tuple[Tensor, Tensor]],
        starts: Tensor,
        column: Tensor,
    ) -> Tensor:
        """Add a token to each row and return the logits (rows, V) of the next ones.

        Args:
            hidden: (rows, H), the tokens' embeddings; overwritten.
            cos, sin: (rows, D), of the rotary embedding.
            cache: keys and values (rows, key heads, length, D) of each layer; written in the current column.
            starts: (rows,) int64, the first column that each row sees.
            column: (1,) int64, the current column.
        """
        dtype, delta = self.head.dtype, None
        for layer, (keys, values) in zip(self.layers, cache, strict=True):
            x = add_norm(hidden, delta, layer.input_norm, self.epsilon, dtype, self.backend)
            qkv = linear(x, layer.qkv, layer.qkv_bias)
            query = place_heads(
                qkv, cos, sin, layer.head_norms, keys, values, column, self.heads, self.epsilon, self.backend
            )
            attended = decode_attention(query, keys, values, starts, column, self.scale, backend=self.backend)
            delta = linear(attended.flatten(1), layer.out, layer.out_bias)
            x = add_norm(hidden, delta, layer.post_norm, self.epsilon, dtype, self.backend)
            delta = linear(gate(linear(x, layer.gate_up), self.backend), layer.down)
        x = add_norm(hidden, delta, self.norm, self.epsilon, dtype, self.backend)
        return linear(x, self.head)
