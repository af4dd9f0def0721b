"""A decoder for Llama-shaped models with fp32 weights on the CPU: one call of the C++ backend runs all layers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from repo_kernels.layers.decoding import COLUMNS, Cache, DecoderStack, LayerWeights, available, multiply
from repo_kernels.layers.forwards import replaced_forwards

from ..data.sequences import Sequences, make_sequences
from ..models.adapters import is_linear, weight_of
from ..models.layout import relative_difference
from ..models.lm_head import trunk_of
from ..models.policy import Policy
from .kv_cache import GrowingDecoder, make_cache, prefill

TOLERANCE = 1e-4  # of logits, relative to their largest magnitude
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class FusedDecoder:
    """A decoder with packed copies of the weights; see Decoder. Finished rows leave at once and nothing is copied."""

    def __init__(self, model: Any, limit: int, dtype: torch.dtype = torch.float32) -> None:
        """Pack the present weights. limit: largest number of tokens of a response. dtype: see DecoderStack."""
        self.model, self.limit, self.stack = model, limit, make_stack(model, dtype)
        self.embed, self.rotary = model.get_input_embeddings(), trunk_of(model).rotary_emb

    def start(self, prefix: Sequences, samples: int) -> Tensor:
        """Begin a batch and return the logits of the first token; see Decoder."""
        prompts = make_cache(self.model, 0)
        logits = prefill(self.model, prefix, prompts)
        lengths, width = prefix.prompt_lengths.tolist(), prefix.prompt_width
        layers: Any = prompts.layers
        _, heads, _, columns = layers[0].keys.shape
        self.cache = Cache(len(layers), len(lengths) * samples, heads, columns, max(lengths) + self.limit)
        for i, layer in enumerate(layers):
            for p, length in enumerate(lengths):
                places = slice(p * samples, (p + 1) * samples)
                self.cache.write(i, places, *(x[p, :, width - length :] for x in (layer.keys, layer.values)))
        self.slots = torch.arange(len(lengths) * samples, dtype=torch.int32)
        self.lengths = prefix.prompt_lengths.to(torch.int32).repeat_interleave(samples)
        return logits.repeat_interleave(samples, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to each row and return the logits of the next one; see Decoder."""
        x = self.embed(tokens)
        cos, sin = (t.squeeze(1).contiguous() for t in self.rotary(x[:, None], self.lengths[:, None].long()))
        logits = self.stack.step(x, cos, sin, self.cache, self.slots, self.lengths)
        self.lengths = self.lengths + 1
        return logits

    def keep(self, rows: Tensor) -> bool:
        """Drop all rows but `rows` and return True."""
        self.slots, self.lengths = self.slots[rows], self.lengths[rows]
        return True

    @contextmanager
    def linears(self) -> Iterator[None]:
        """Context in which the model's own linear layers, which read the prompts, multiply by the packed weights."""
        packed: dict[nn.Linear, Tensor] = {self.model.lm_head: self.stack.head}
        for layer, weights in zip(trunk_of(self.model).layers, self.stack.packed, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            joined = attention.q_proj, attention.k_proj, attention.v_proj
            packed |= zip(joined, weights["qkv"].split([m.out_features // COLUMNS for m in joined]), strict=True)
            packed |= {attention.o_proj: weights["out"], mlp.gate_proj: weights["gate"]}
            packed |= {mlp.up_proj: weights["up"], mlp.down_proj: weights["down"]}
        with replaced_forwards({m: functools.partial(_forward, m, weight) for m, weight in packed.items()}):
            yield


def _forward(layer: nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
    return multiply(x, weight, layer.out_features, layer.bias)


def make_stack(model: Any, dtype: torch.dtype = torch.float32) -> DecoderStack:
    """Pack the weights of a model that `why_unfused` accepts, with its LoRA adapters added unless they are off."""
    base = trunk_of(model)
    layers = [_weights(layer) for layer in base.layers]
    scale, epsilon = base.layers[0].self_attn.scaling, base.norm.variance_epsilon
    heads = len(layers[0].q) // base.layers[0].self_attn.head_dim
    key_heads = len(layers[0].k) // base.layers[0].self_attn.head_dim
    return DecoderStack(layers, base.norm.weight, model.lm_head.weight, heads, key_heads, epsilon, scale, dtype)


def _weights(layer: Any) -> LayerWeights:
    a, mlp = layer.self_attn, layer.mlp
    biases = [m.bias for m in (a.q_proj, a.k_proj, a.v_proj)]
    return LayerWeights(
        input_norm=layer.input_layernorm.weight,
        q=weight_of(a.q_proj),
        k=weight_of(a.k_proj),
        v=weight_of(a.v_proj),
        qkv_bias=None if biases[0] is None else torch.cat([b.detach() for b in biases]),
        q_norm=a.q_norm.weight if hasattr(a, "q_norm") else None,
        k_norm=a.k_norm.weight if hasattr(a, "k_norm") else None,
        out=weight_of(a.o_proj),
        out_bias=a.o_proj.bias,
        post_norm=layer.post_attention_layernorm.weight,
        gate=weight_of(mlp.gate_proj),
        up=weight_of(mlp.up_proj),
        down=weight_of(mlp.down_proj),
    )


_why_unfused: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def why_unfused(policy: Policy) -> str:
    """Return the reason why a model does not decode by FusedDecoder, "" if it does. The answer is kept for each model.

    A model with the modules of Llama is tried: its logits must be those of GrowingDecoder.
    """
    model = policy.model
    if model not in _why_unfused:
        _why_unfused[model] = _why_not_shaped(model) or _why_not_equal(policy)
    return _why_unfused[model]


def _why_not_shaped(model: Any) -> str:
    """Return why FusedDecoder does not compute a model, "" if nothing is to be seen."""
    if not available():
        return "repo_kernels was built without its C++ backend"
    if {(p.device.type, p.dtype) for p in model.parameters()} != {("cpu", torch.float32)}:
        return "not all weights are fp32 on the CPU"
    return "autocast is on" if torch.is_autocast_enabled("cpu") else why_not_llama(model, adapters=True)


def why_not_llama(model: Any, adapters: bool = False) -> str:
    """Return what a model has that the layers of Llama have not, "" if there is nothing to be seen.

    adapters: accept linear layers with plain LoRA adapters.
    """
    base = trunk_of(model)
    layers = list(getattr(base, "layers", ()))
    parts = [base, *layers, *(getattr(x, name, None) for x in layers for name in ("self_attn", "mlp"))]
    if not layers or None in parts or not hasattr(base, "rotary_emb") or not hasattr(base, "norm"):
        return "its modules are not those of Llama"
    for layer in layers:
        names = {name for name, _ in layer.named_children()}, {name for name, _ in layer.self_attn.named_children()}
        if names[0] != LAYER or not names[1] <= ATTENTION:
            return f"its layers have other parts than Llama's ({', '.join(sorted(names[0] | names[1]))})"
        linears: list[Any] = [getattr(layer.self_attn, n, None) for n in ("q_proj", "k_proj", "v_proj", "o_proj")]
        linears += [getattr(layer.mlp, n, None) for n in ("gate_proj", "up_proj", "down_proj")]
        if not all(is_linear(m) if adapters else type(m) is nn.Linear for m in linears):
            return "not every projection is an nn.Linear"
        if any(m.bias is not None for m in linears[4:]):
            return "its MLP has biases"
        if len({m.bias is None for m in linears[:3]}) > 1:
            return "only some of queries, keys and values have a bias"
        widths = {m.in_features % COLUMNS for m in linears} | {m.out_features % COLUMNS for m in linears}
        if widths != {0} or getattr(layer.self_attn, "head_dim", 1) % COLUMNS:
            return f"a width is no multiple of {COLUMNS}"
    if type(getattr(model, "lm_head", None)) is not nn.Linear or model.lm_head.bias is not None:
        return "its head is not an nn.Linear without bias"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return "not every layer has full attention"
    return ""


@torch.no_grad()
def _why_not_equal(policy: Policy) -> str:
    """Return how far FusedDecoder is from GrowingDecoder on a few tokens, "" if their logits agree."""
    prefix = make_sequences([[5, 6, 7, 8, 9], [8, 4, 9]], [[], []], policy.pad_id)
    tokens = torch.tensor([5, 9, 6, 7])
    try:
        growing, fused = GrowingDecoder(policy.model, 4), FusedDecoder(policy.model, 4)
        expected, got = growing.start(prefix, 2), fused.start(prefix, 2)
        for rows in (torch.arange(4), torch.tensor([0, 2, 3])):
            if not growing.keep(rows):
                return "its cache cannot drop rows"
            fused.keep(rows)
            expected, got = growing.step(tokens[rows]), fused.step(tokens[rows])
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    difference = relative_difference(got, expected)
    return "" if difference <= TOLERANCE else f"its logits would differ by {difference:.1e} of the largest"
