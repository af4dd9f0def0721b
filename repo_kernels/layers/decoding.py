"""Decoding with Llama-shaped models on the CPU: one call of csrc/decoding/step.cpp for all layers of a step.

Through PyTorch a step takes some fifteen operators per layer, and its products, with a dozen rows, run at half of the
machine's rate. Here threads start once per step, and each weight is read once, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.cpu import decoding as cpu
from ..backends.cpu.decoding import multiply
from ..backends.cpu.extension import available

__all__ = ["COLUMNS", "Cache", "DecoderStack", "LayerWeights", "available", "multiply"]

Matrices = dict[str, tuple[Tensor, ...]]  # by the name of their product, joined along the outputs
COLUMNS = cpu.COLUMNS  # hidden width, inner width and head dimension are multiples of this


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer, fp32 on the CPU.

    Args:
        input_norm, post_norm: (H,), of the RMSNorms before attention and before the MLP.
        q, k, v: (heads * D, H) and twice (key heads * D, H); qkv_bias: their biases, joined, or None.
        q_norm, k_norm: (D,), of RMSNorms on each head before the rotary embedding, or None.
        out: (H, heads * D); out_bias: (H,) or None.
        gate, up: (I, H).
        down: (H, I).
    """

    input_norm: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    post_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor


class Cache:
    """Keys and values of several sequences, each from column 0 on of a place of its own.

    Args:
        layers, places, key_heads, columns: sizes; `columns` of a head.
        capacity: largest number of tokens of a sequence.
    """

    def __init__(self, layers: int, places: int, key_heads: int, columns: int, capacity: int) -> None:
        capacity = -(-capacity // COLUMNS) * COLUMNS
        self.keys = torch.empty(layers, places, key_heads, columns, capacity)
        self.values = torch.empty(layers, places, key_heads, capacity, columns)

    def write(self, layer: int, places: slice, keys: Tensor, values: Tensor) -> None:
        """Write the first n keys and values (key heads, n, columns) of all sequences in `places`."""
        count = keys.shape[1]
        self.keys[layer, places, :, :, :count] = keys.transpose(1, 2)
        self.values[layer, places, :, :count] = values


class DecoderStack:
    """Packed copies of a model's layers, final norm and head, and the step that adds a token to each sequence.

    The copies do not follow later changes of the weights.

    Args:
        layers: at least one.
        norm: (H,), of the final RMSNorm.
        head: (V, H).
        heads, key_heads: of queries, and of keys and values.
        epsilon: of every RMSNorm.
        scale: factor of the attention scores.
        dtype: of the copies, float32 or bfloat16; in bfloat16 the inputs of products are rounded too. Sums, norms,
            attention and cache are in fp32.
    """

    def __init__(
        self,
        layers: Sequence[LayerWeights],
        norm: Tensor,
        head: Tensor,
        heads: int,
        key_heads: int,
        epsilon: float,
        scale: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        matrices: list[Matrices] = [*map(_matrices, layers), {"head": (head,)}]
        memory = cpu.new_memory(sum(_size(weights) for named in matrices for weights in named.values()), dtype)
        *self.packed, last = _pack(matrices, memory)
        self.head = last["head"]
        self.vocabulary, first = len(head), layers[0]
        self._model = cpu.make_model(
            heads, key_heads, len(first.q) // heads, len(first.gate), epsilon, scale,
            [_parts(layer, packed) for layer, packed in zip(layers, self.packed, strict=True)],
            norm.detach(), self.head, self.vocabulary,
        )  # fmt: skip

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache, slots: Tensor, lengths: Tensor) -> Tensor:
        """Add a token to each of B sequences and return the logits (B, V) of the next ones.

        Args:
            x: (B, H), the tokens' embeddings; overwritten.
            cos, sin: (B, D), of the rotary embedding.
            cache: holds the keys and values of the earlier tokens; those of the new ones are appended.
            slots: (B,) int32, different places of the cache.
            lengths: (B,) int32, tokens of each sequence before the new one, below the capacity.

        Raises:
            ValueError: for tensors of other types or shapes, places that do not exist or a full place.
        """
        return cpu.step(self._model, x, cos, sin, cache.keys, cache.values, slots, lengths, self.vocabulary)


def _matrices(layer: LayerWeights) -> Matrices:
    """Return the weights of each product by name."""
    products: Matrices = {"qkv": (layer.q, layer.k, layer.v), "out": (layer.out,)}
    return products | {"gate": (layer.gate,), "up": (layer.up,), "down": (layer.down,)}


def _size(weights: Sequence[Tensor]) -> int:
    """Return the elements of packed weights."""
    return sum(cpu.panels_of(len(weight)) * COLUMNS * weight.shape[1] for weight in weights)


def _pack(matrices: Sequence[Matrices], memory: Tensor) -> list[dict[str, Tensor]]:
    """Pack weights into one block of memory, in the order in which a step reads them. Several of a name are joined."""
    packed: list[dict[str, Tensor]] = []
    at = 0
    for named in matrices:
        packed.append({})
        for name, weights in named.items():
            first = at
            for weight in weights:
                size = _size([weight])
                cpu.pack(weight, cpu.packed_view(memory[at : at + size], weight.shape[1]))
                at += size
            packed[-1][name] = cpu.packed_view(memory[first:at], weights[0].shape[1])
    return packed


def _parts(layer: LayerWeights, packed: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    """Return what the extension takes of a layer, in its order."""
    vectors = layer.input_norm, layer.qkv_bias, layer.q_norm, layer.k_norm, layer.out_bias, layer.post_norm
    input_norm, qkv_bias, q_norm, k_norm, out_bias, post_norm = (v if v is None else v.detach() for v in vectors)
    attention = input_norm, packed["qkv"], qkv_bias, q_norm, k_norm, packed["out"], out_bias
    return *attention, post_norm, packed["gate"], packed["up"], packed["down"]
