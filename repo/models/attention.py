"""Attention over packed rows: who attends to whom, one function for transformers' models, and the choice of its kernel.

Every sequence of a packed row attends to itself alone, causally, and a response that shares its prompt also to that
prompt. No T x T mask is built and nothing waits for the device. On CUDA it is FlashAttention's varlen kernel, on a CPU
in fp32 that of repo_kernels, elsewhere PyTorch's SDPA, called once for adjacent sequences of equal length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from repo_kernels.layers import packed_attention as cpu_attention

from ..common.errors import first_line
from ..common.seeds import generator
from ..data.packing import Packed, pack
from ..data.segments import Segments, make_segments, take_rows
from ..data.sequences import make_sequences

IMPLEMENTATION = "repo_packed"
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float, int | None, float | None], Tensor]


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


def per_run(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """q (T, Hq, D), k, v (K, Hk, D) -> (T, Hq, D): one SDPA call for each run of segments."""
    queries = q.split([run.number * run.queries for run in segments.runs])
    keys, values = (x.split([run.number * run.keys for run in segments.runs]) for x in (k, v))
    found = []
    for run, *parts in zip(segments.runs, queries, keys, values, strict=True):
        a, b, c = (x.unflatten(0, (run.number, -1)).transpose(1, 2) for x in parts)  # (number, heads, length, D)
        mask = segments.mask(run, window, q)
        if softcap is not None:
            out = _softcapped(a, b, c, mask, scale, softcap)
        elif q.device.type == "cpu" or a.shape[1] == b.shape[1]:
            out = F.scaled_dot_product_attention(
                a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=a.shape[1] != b.shape[1]
            )
        else:  # the memory-efficient CUDA kernel, which fp32 needs, takes no grouped heads
            b, c = _repeat(b, a.shape[1]), _repeat(c, a.shape[1])
            out = F.scaled_dot_product_attention(a, b, c, attn_mask=mask, is_causal=mask is None, scale=scale)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found)


def _softcapped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """softmax(softcap tanh(q k^T scale / softcap) + mask) v, which no SDPA kernel has."""
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))
    if mask is None:
        length = q.shape[2]
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    else:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


@lru_cache
def varlen_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False
) -> tuple[str, Kernel] | None:
    """Name and function of the varlen kernel for this device, dtype and head size; None: `per_run` does it."""
    if not softcap and cpu_attention.available(device, dtype, head_dim):
        return "C++ varlen", cpu_kernel
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return first_that_agrees(device, dtype, head_dim, softcap)


def first_that_agrees(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool
) -> tuple[str, Kernel] | None:
    """The first installed kernel that gives here what `per_run` gives."""
    for name, package, attribute, adapt in _VARLEN:
        try:
            kernel = adapt(getattr(import_module(package), attribute))
            if _agrees(kernel, device, dtype, head_dim, 20.0 if softcap else None):
                return name, kernel
        except Exception:  # not installed, or each refuses a device, head size or softcap in its own way
            continue
    return None


def cpu_kernel(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """repo_kernels' attention as a Kernel."""
    if softcap is not None:
        raise ValueError(f"softcap: the C++ attention has none, got {softcap}")
    return cpu_attention.attention(q, k, v, segments.cu_q, segments.cu_k, scale, window)


def flash_kernel(function: Callable[..., Any]) -> Kernel:
    """FlashAttention's flash_attn_varlen_func as a Kernel; its versions differ in what they take and return."""
    accepted = inspect.signature(function).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
        if "deterministic" in accepted:
            options["deterministic"] = True
        if "max_seqlen_q" in accepted:
            options |= {"max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k}
        if window is not None:
            options["window_size"] = (window - 1, 0)
        if softcap is not None:
            options["softcap"] = softcap
        out = function(q, k, v, cu_seqlens_q=segments.cu_q, cu_seqlens_k=segments.cu_k, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


def torch_kernel(function: Callable[..., Any]) -> Kernel:
    """torch.nn.attention.varlen.varlen_attn, which is FlashAttention 2 without softcap, as a Kernel."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        if softcap is not None:
            raise ValueError(f"softcap: varlen_attn has none, got {softcap}")
        lengths = segments.cu_q, segments.cu_k, segments.max_q, segments.max_k
        left = -1 if window is None else window - 1
        return function(q, k, v, *lengths, scale=scale, window_size=(left, 0), enable_gqa=q.shape[1] != k.shape[1])

    return attend


_VARLEN = (
    ("FlashAttention 3 varlen", "flash_attn_interface", "flash_attn_varlen_func", flash_kernel),
    ("FlashAttention 4 varlen", "flash_attn.cute", "flash_attn_varlen_func", flash_kernel),
    ("FlashAttention 2 varlen", "flash_attn", "flash_attn_varlen_func", flash_kernel),
    ("PyTorch varlen_attn", "torch.nn.attention.varlen", "varlen_attn", torch_kernel),
)


@torch.enable_grad()
def _agrees(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None) -> bool:
    """Output and gradients of a kernel against `per_run`, with a shared prompt, and with a window."""
    segments = make_segments(*torch.tensor([[5, 3, 3], [0, 0, 0], [0, 5, 5]])).to(device)
    shapes = (11, 4, head_dim), (21, 2, head_dim), (21, 2, head_dim)
    inputs = [torch.randn(shape, generator=generator("kernel probe")) for shape in shapes]
    q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
    for window in (None, 4):
        found = []
        for attend in (per_run, kernel):
            out = attend(q, k, v, segments, head_dim**-0.5, window, softcap)
            found.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        if not all(torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05) for a, b in zip(*found, strict=True)):
            return False
    return True


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
