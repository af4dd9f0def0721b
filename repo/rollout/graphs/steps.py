"""The three ways to compute a step in static buffers: the logits of one new token per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from repo_kernels.layers.decode_attention import decode_attention
from repo_kernels.layers.decode_stack import LayerWeights, StaticStack

from ...attention.packed import using_attention
from ...models.lm_head import trunk_of
from ..kv_cache import read
from .buffers import Buffers
from .weights import DecodeWeights

IMPLEMENTATION = "repo_decode"


@dataclass(frozen=True)
class Seen:
    """Which columns of a static cache the rows of a step see; see decode_attention.

    starts: (rows,) int64. column: (1,) int64. backend: of decode_attention.
    """

    starts: Tensor
    column: Tensor
    backend: str | None


def cached_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    seen: Seen | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one layer for one new token per row, with the signature that transformers' models call.

    Args:
        query: (rows, Hq, 1, D). key, value: (rows, Hk, length, D), the static cache. attention_mask: None.
        seen: the columns that each row sees; passed through the model's keyword arguments.
        scaling: factor of the scores, None for D^-1/2. sliding_window: columns that a row sees at most, None for all.
        softcap: bound of the scores, None for no bound.
        more: what else the model passes; it must change nothing, which the trial of the model finds.

    Returns:
        (rows, 1, Hq, D) in the dtype of `value`; and None in place of attention weights.

    Raises:
        ValueError: `seen` is missing, a mask is given, or dropout is not 0.
    """
    if seen is None or attention_mask is not None or dropout:
        raise ValueError("the attention over a static cache takes the columns that rows see, no mask and no dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q = query.squeeze(2).to(value.dtype)
    out = decode_attention(
        q, key, value, seen.starts, seen.column, scale, sliding_window, softcap or 0.0, seen.backend
    )  # fmt: skip
    return out[:, None], None


AttentionInterface.register(IMPLEMENTATION, cached_attention)


def backend_of(device: torch.device) -> str | None:
    """Return the backend of the kernels: Triton on a GPU, where PyTorch in its place would be slower than SDPA."""
    return "triton" if device.type == "cuda" else None


class MaskedStep:
    """The model's own attention with a 4-D mask over the whole cache."""

    name = "4-D mask"

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, buffers: Buffers, rows: int) -> Tensor:
        """Return the logits (rows, V) after the first rows' tokens, whose keys and values are written."""
        columns = torch.arange(buffers.length, device=buffers.column.device)
        seen = (columns >= buffers.starts[:rows, None]) & (columns <= buffers.column)
        mask = torch.zeros(seen.shape, dtype=buffers.dtype, device=seen.device)
        mask = mask.masked_fill(~seen, torch.finfo(buffers.dtype).min)[:, None, None]
        return read(
            self.model,
            buffers.cache(self.model, rows),
            input_ids=buffers.tokens[:rows, None],
            attention_mask=mask,
            position_ids=buffers.positions[:rows, None],
        )


class AttentionStep:
    """The model with `cached_attention` in its layers, which reads no mask and copies no keys."""

    name = "attention kernel"

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, buffers: Buffers, rows: int) -> Tensor:
        """Return the logits (rows, V); see MaskedStep."""
        seen = Seen(buffers.starts[:rows], buffers.column, backend_of(buffers.column.device))
        with using_attention(self.model, IMPLEMENTATION):
            return read(
                self.model,
                buffers.cache(self.model, rows),
                input_ids=buffers.tokens[:rows, None],
                position_ids=buffers.positions[:rows, None],
                seen=seen,
            )


class StackStep:
    """The layers of a Llama-shaped model as matrix products with one kernel between two of them."""

    name = "fused layers"

    def __init__(self, model: Any, weights: DecodeWeights) -> None:
        self.embed, self.rotary = model.get_input_embeddings(), trunk_of(model).rotary_emb
        self.stack = make_stack(model, weights)

    def __call__(self, buffers: Buffers, rows: int) -> Tensor:
        """Return the logits (rows, V); see MaskedStep."""
        x = self.embed(buffers.tokens[:rows])
        cos, sin = (t.squeeze(1).contiguous() for t in self.rotary(x[:, None], buffers.positions[:rows, None]))
        return self.stack.step(x, cos, sin, buffers.first(rows), buffers.starts[:rows], buffers.column)


def joined_layers(model: Any) -> list[list[nn.Linear]]:
    """List the layers of a Llama-shaped model that have the same input: queries, keys and values; gate and up."""
    layers = trunk_of(model).layers
    joined = [[x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj] for x in layers]
    return joined + [[x.mlp.gate_proj, x.mlp.up_proj] for x in layers]


def make_stack(model: Any, weights: DecodeWeights) -> StaticStack:
    """Make the stack of a Llama-shaped model from copies whose layers are joined as `joined_layers` says."""
    base, whole = trunk_of(model), iter(weights.whole)
    count = len(base.layers)
    qkv, gate_up = ([next(whole) for _ in range(count)] for _ in range(2))
    layers = [
        LayerWeights(
            input_norm=layer.input_layernorm.weight.detach(),
            qkv=qkv[i][0],
            qkv_bias=qkv[i][1],
            head_norms=_head_norms(layer.self_attn),
            out=weights.of(model, layer.self_attn.o_proj)[0],
            out_bias=weights.of(model, layer.self_attn.o_proj)[1],
            post_norm=layer.post_attention_layernorm.weight.detach(),
            gate_up=gate_up[i][0],
            down=weights.of(model, layer.mlp.down_proj)[0],
        )
        for i, layer in enumerate(base.layers)
    ]
    attention = base.layers[0].self_attn
    heads = attention.q_proj.out_features // attention.head_dim
    head = weights.of(model, model.lm_head)[0]
    epsilon, backend = base.norm.variance_epsilon, backend_of(head.device)
    return StaticStack(layers, base.norm.weight.detach(), head, heads, epsilon, attention.scaling, backend)


def _head_norms(attention: Any) -> tuple[Tensor, Tensor] | None:
    """Return the weights of the norms on queries and keys, None if there are none."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
