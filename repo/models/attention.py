"""Attention over packed rows: a function for transformers' models, and the test of which models can use it.

Every sequence of a packed row attends causally to itself alone; a response that shares its prompt also attends to that
prompt. The kernels that compute this are in varlen.py.
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
    """Compute the attention of one layer over a packed row, with the signature that transformers' models call.

    Args:
        query: (1, Hq, T, D). key, value: (1, Hk, T, D). attention_mask: not used.
        segments: which tokens attend to which; passed through the model's keyword arguments.
        scaling: factor of the scores, None for D^-1/2. sliding_window: keys that a query attends to at most, None for
            all. softcap: bound of the scores by softcap * tanh(score / softcap), None for no bound.
        windows: passed through the model's keyword arguments; filled with each layer's sliding_window.

    Returns:
        (1, T, Hq, D) in the dtype of autocast, or else of `value`; and None in place of attention weights.

    Raises:
        ValueError: segments are missing, or dropout is not 0.
    """
    if segments is None:
        raise ValueError("segments must be given to packed attention through the model's arguments; got None")
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
    kernel = varlen_kernel(query.device, dtype, q.shape[-1], softcap is not None)
    attend = per_run if kernel is None else kernel[1]
    return attend(q, k, v, segments, scale, sliding_window, softcap)[None], None


AttentionInterface.register(IMPLEMENTATION, packed_attention)


def using_packed(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the model's layers use `packed_attention`; its forward then takes `segments=`, no mask.

    Layers read the name of the attention function from the config when they run, so that layers that are recomputed in
    the backward pass need `recompute_contexts` too.
    """
    return _Implementation(model, [IMPLEMENTATION, IMPLEMENTATION])


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


@dataclass(frozen=True)
class Attention:
    """The way a model reads prompts and responses.

    packs: True for end to end in one row (packing.pack), False for padded (packing.pad). name: of the kernel or the
    function that computes attention. why: the reason why no faster one is used, "" if there is none faster.
    """

    packs: bool
    name: str
    why: str

    def describe(self) -> str:
        """Describe it in one line."""
        return f"attention: {self.name}" + ", packed" * self.packs + f" ({self.why})" * bool(self.why)


def choose_attention(model: Any, device: torch.device, dtype: torch.dtype) -> Attention:
    """Decide how a causal LM or a trunk reads its input: by its config, then by a trial in which packed and separate
    sequences must give the same states.

    dtype: of the forward pass; autocast is used if the weights have another one.
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
    """Return the reason why a model cannot read packed rows, None if it can."""
    name, text = type(trunk).__name__, trunk.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if other := set(kinds or ()) - {"full_attention", "sliding_attention"}:
        return f"{name} has layers of {', '.join(sorted(other))}"
    if not getattr(trunk, "_supports_attention_backend", False):
        return f"{name} does not accept a custom attention function"
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        return f"{name} takes no position_ids"
    ids = torch.randint(0, text.vocab_size, (4, 9), generator=generator("packing probe")).tolist()
    prompts, responses = [ids[0][:5]] * 3 + [ids[1][:3]], [ids[1][:5], ids[2][:5], ids[3][:3], ids[2][5:]]
    probe = make_sequences(prompts, responses, 0, torch.tensor([0, 0, 0, 1]))
    packed = pack(probe, torch.arange(4), share_prefix=True).to(device)
    windows: dict[int, int | None] = {}
    try:
        difference = _probe(trunk, packed, probe.token_lists(), windows)
    except Exception as error:  # models raise errors of many types
        return f"{name} failed on packed rows: {first_line(error)}"
    window = getattr(text, "sliding_window", None)
    kinds = kinds or ["sliding_attention"] * len(windows)  # without layer_types the window holds for every layer
    expected = {layer: window if kinds[layer] == "sliding_attention" else None for layer in windows}
    if windows != expected:
        return f"{name} does not pass the windows of its layers to its attention function"
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    return None if difference < tolerance else f"packed rows change the states of {name} by {difference:.1e}"


@torch.no_grad()
def _probe(
    trunk: Any, packed: Packed, rows: list[tuple[list[int], list[int]]], windows: dict[int, int | None]
) -> float:
    """Compare packed states with those of each row alone; returns the largest difference relative to the largest state.

    windows: filled with each layer's sliding window, which has no effect on rows as short as these.
    """
    arguments = {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "segments": packed.segments}
    with using_packed(trunk):
        packed_states = trunk(**arguments, windows=windows, use_cache=False).last_hidden_state[0, packed.rows]
    expected = []
    for prompt, response in (rows[row] for row in packed.order.tolist()):
        ids = torch.tensor([prompt + response[:-1]], device=packed.device)
        expected.append(trunk(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :])
    states = torch.cat(expected)
    return float((packed_states - states).abs().max() / states.abs().max())
