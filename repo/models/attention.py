"""Attention over packed rows: who attends to whom, as a function for transformers, and whether a model can use it.

Every sequence of a packed row attends to itself alone, causally, and a response that shares its prompt also to that
prompt. What computes it is in varlen.py.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..common.errors import first_line
from ..common.seeds import generator
from ..data.packing import Packed, pack
from ..data.segments import Segments, take_rows
from ..data.sequences import make_sequences
from .varlen import per_run, varlen_kernel

IMPLEMENTATION = "repo_packed"


@torch.compiler.disable
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
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers' models call in each layer: query (1, Hq, T, D), key, value (1, Hk, T, D) -> (1, T, Hq, D).

    segments, and windows for a reader of each layer's window, come through the model's keyword arguments. Under
    autocast the result is of its dtype.
    """
    if segments is None:
        raise ValueError("segments: packed attention takes packing.Segments through the model's arguments, got None")
    if dropout:
        raise ValueError(f"dropout: packed attention has none, got {dropout}; put the model in eval mode")
    if windows is not None:
        windows[getattr(module, "layer_idx", len(windows))] = sliding_window
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if segments.keys is not None:
        k, v = take_rows(k, segments.keys), take_rows(v, segments.keys)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = varlen_kernel(query.device, dtype, q.shape[-1], softcap is not None)
    attend = per_run if kernel is None else kernel[1]
    return attend(q, k, v, segments, scale, sliding_window, softcap)[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def using_packed(model: Any) -> AbstractContextManager[None]:
    """Within it the model's layers attend by `packed_attention`; its forward takes `segments=`, and no attention mask.

    Layers read the implementation from the config as they run, so layers that are recomputed in the backward need
    `recompute_contexts` too.
    """
    return _Implementation(model, [IMPLEMENTATION, IMPLEMENTATION])


def recompute_contexts(model: Any) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """context_fn of torch.utils.checkpoint: layers are recomputed with the attention that they had in the forward."""
    return nullcontext(), _Implementation(model, [config._attn_implementation for config in _configs(model)])


class _Implementation(AbstractContextManager[None]):
    """Names the attention function that a model's layers look up. It may be entered again, also within itself."""

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
            config._attn_implementation_internal = name  # the public setter would reach a vision tower's config too


def _configs(model: Any) -> list[Any]:
    """The config and the text config, often the same."""
    return [model.config, model.config.get_text_config()]


@dataclass(frozen=True)
class Attention:
    """How a model reads prompts and responses. packs: end to end in one row (packing.pack), else padded (packing.pad).

    name: what computes it. why: why nothing better does, "" where there is nothing better.
    """

    packs: bool
    name: str
    why: str

    def describe(self) -> str:
        """One line."""
        return f"attention: {self.name}" + ", packed" * self.packs + f" ({self.why})" * bool(self.why)


def choose_attention(model: Any, device: torch.device, dtype: torch.dtype) -> Attention:
    """Decide by the config of a causal LM or its trunk, then by trying: packed and separate sequences must agree.

    dtype: of the forward, by autocast where it is not that of the weights.
    """
    with torch.autocast(device.type, dtype, enabled=dtype != model.dtype):
        obstacle = _obstacle(model.base_model, device, dtype)
    text = model.config.get_text_config()
    if obstacle:
        return Attention(False, f"padded batches, the model's own {text._attn_implementation}", obstacle)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    softcap = getattr(text, "attn_logit_softcapping", None) is not None
    kernel = varlen_kernel(device, dtype, head_dim, softcap)
    if kernel is not None:
        return Attention(True, kernel[0], "")
    why = "no FlashAttention installed that runs here"
    if device.type != "cuda":
        why = "FlashAttention needs CUDA"
    elif dtype not in (torch.float16, torch.bfloat16):
        why = f"FlashAttention takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    return Attention(True, f"PyTorch {'softcapped softmax' if softcap else 'SDPA'} per sequence", why)


def _obstacle(trunk: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a model cannot read packed rows; None when it can."""
    name, text = type(trunk).__name__, trunk.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if other := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        return f"{name} has layers of {', '.join(sorted(other))}"
    if not getattr(trunk, "_supports_attention_backend", False):
        return f"{name} does not take attention functions of others"
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return f"{name} takes no position_ids"
    ids = torch.randint(0, text.vocab_size, (4, 9), generator=generator("packing probe")).tolist()
    prompts, responses = [ids[0][:5]] * 3 + [ids[1][:3]], [ids[1][:5], ids[2][:5], ids[3][:3], ids[2][5:]]
    probe = make_sequences(prompts, responses, 0, torch.tensor([0, 0, 0, 1]))
    packed = pack(probe, torch.arange(4), share_prefix=True).to(device)
    windows: dict[int, int | None] = {}
    try:
        difference = _probe(trunk, packed, probe.token_lists(), windows)
    except Exception as error:  # each model refuses in its own way
        return f"{name} failed on packed rows: {first_line(error)}"
    window = getattr(text, "sliding_window", None)
    kinds = kinds or ["sliding_attention"] * len(windows)  # a window without kinds is every layer's
    expected = {layer: window if kinds[layer] == "sliding_attention" else None for layer in windows}
    if windows != expected:
        return f"{name} does not tell its attention function the windows of its layers"
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    return None if difference < tolerance else f"packed rows change the states of {name} by {difference:.1e}"


@torch.no_grad()
def _probe(
    trunk: Any, packed: Packed, rows: list[tuple[list[int], list[int]]], windows: dict[int, int | None]
) -> float:
    """Largest difference of packed states from those of each row alone, relative to the largest; fills in each layer's
    window, which the short rows would not show."""
    arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "segments": packed.segments}
    with using_packed(trunk):
        found = trunk(**arguments, windows=windows, use_cache=False).last_hidden_state[0, packed.rows]
    expected = []
    for prompt, response in (rows[row] for row in packed.order.tolist()):
        ids = torch.tensor([prompt + response[:-1]], device=packed.device)
        expected.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    states = torch.cat(expected)
    return float((found - states).abs().max() / states.abs().max())
