"""Candidates: the choice of the kernel, and what each kernel that was not taken refused.

On CUDA in half precision it is the first of FlashAttention's and PyTorch's varlen kernels that runs and agrees with
SDPA, on a CPU in fp32 the C++ kernel of repo_kernels, and else SDPA, called once for each run of sequences of equal
length. No T x T mask is built; the host never waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from repo_kernels.layers import packed_attention as cpu_attention

from ..common.errors import first_line
from ..common.seeds import generator
from ..data.segments import make_segments
from .adapters import cpu_kernel, flash_kernel, torch_kernel
from .sdpa import Kernel, per_run

HALF = (torch.float16, torch.bfloat16)


class _MissingError(Exception):
    """A candidate is not installed; the message says what is missing."""


class Candidate(NamedTuple):
    """A varlen function that may be installed.

    name: in messages. module, function: where it is. adapt: makes a Kernel of it. traceable: torch.compile can have it
    in the graph of a layer, because it is an operator that PyTorch knows; others are called between two graphs.
    """

    name: str
    module: str
    function: str
    adapt: Callable[[Callable[..., Any]], Kernel]
    traceable: bool = False


CANDIDATES = (
    Candidate("FlashAttention 3 varlen", "flash_attn_interface", "flash_attn_varlen_func", flash_kernel),
    Candidate("FlashAttention 4 varlen", "flash_attn.cute", "flash_attn_varlen_func", flash_kernel),
    Candidate("FlashAttention 2 varlen", "flash_attn", "flash_attn_varlen_func", flash_kernel),
    Candidate("PyTorch varlen_attn", "torch.nn.attention.varlen", "varlen_attn", torch_kernel, traceable=True),
)


@dataclass(frozen=True)
class Choice:
    """The kernel of a device, dtype and head size.

    name: of the kernel. kernel: its function. refused: why each kernel that would be preferred is not taken, by name.
    traceable: see Candidate.
    """

    name: str
    kernel: Kernel
    refused: dict[str, str]
    traceable: bool = False

    @property
    def why(self) -> str:
        """Say in a sentence why no preferred kernel is taken; "" if there is none."""
        return "; ".join(f"{name} {reason}" for name, reason in self.refused.items())


@lru_cache
def choose_kernel(
    device: torch.device, dtype: torch.dtype, head_dim: int, softcap: bool = False, window: bool = True
) -> Choice:
    """Choose the kernel for a device, dtype and head size.

    softcap: scores are bounded. window: there are layers with a sliding window.
    """
    if not softcap and cpu_attention.available(device, dtype, head_dim):
        return Choice("C++ varlen", cpu_kernel, {})
    if device.type != "cuda":
        return Choice(sdpa_name(softcap), per_run, {"FlashAttention": "needs CUDA"})
    if dtype not in HALF:
        why = f"takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
        return Choice(sdpa_name(softcap), per_run, {"FlashAttention": why})
    return first_that_agrees(device, dtype, head_dim, softcap, window)


def sdpa_name(softcap: bool) -> str:
    """Name what `per_run` does. softcap: the model bounds its scores."""
    return f"PyTorch {'softcapped softmax' if softcap else 'SDPA'} per sequence"


def first_that_agrees(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    softcap: bool,
    window: bool,
    candidates: tuple[Candidate, ...] = CANDIDATES,
) -> Choice:
    """Choose the first candidate that is installed and agrees with `per_run` on the device, else `per_run`."""
    refused: dict[str, str] = {}
    for candidate in candidates:
        try:
            kernel = candidate.adapt(_function(candidate))
            refusal = _disagreement(kernel, device, dtype, head_dim, 20.0 if softcap else None, window)
        except _MissingError as error:
            refusal = str(error)
        except Exception as error:  # refuses the device, head size or softcap with an error of any type
            refusal = f"fails: {first_line(error)}"
        if not refusal:
            return Choice(candidate.name, kernel, refused, candidate.traceable)
        refused[candidate.name] = refusal
    return Choice(sdpa_name(softcap), per_run, refused)


def _function(candidate: Candidate) -> Callable[..., Any]:
    """Import a candidate's function. Raises _MissingError."""
    try:
        module = import_module(candidate.module)
    except ModuleNotFoundError as error:
        package = candidate.module.partition(".")[0]
        if error.name in (package, candidate.module):
            raise _MissingError("is not installed") from error
        raise _MissingError(f"needs the package {error.name}") from error
    # FlashAttention 4 shares the folder flash_attn with version 2, which may be absent from it
    if not hasattr(module, candidate.function):
        raise _MissingError(f"is not installed: {candidate.module} has no {candidate.function}")
    function: Callable[..., Any] = getattr(module, candidate.function)
    return function


@torch.enable_grad()
def _disagreement(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int, softcap: float | None, window: bool
) -> str:
    """Say how a kernel's output or gradients differ from those of `per_run`; "" if they do not.

    The inputs have a shared prompt. window: try a sliding window too.
    """
    segments = make_segments(*torch.tensor([[5, 3, 3], [0, 0, 0], [0, 5, 5]])).to(device)
    shapes = (11, 4, head_dim), (21, 2, head_dim), (21, 2, head_dim)
    inputs = [torch.randn(shape, generator=generator("kernel probe")) for shape in shapes]
    q, k, v = (x.to(device, dtype).requires_grad_() for x in inputs)
    for keys in (None, 4) if window else (None,):
        results = []
        for attend in (per_run, kernel):
            out = attend(q, k, v, segments, head_dim**-0.5, keys, softcap)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (q, k, v))))
        for name, a, b in zip(("an output", "a dq", "a dk", "a dv"), *results, strict=True):
            if not torch.allclose(a.float(), b.float(), rtol=0.05, atol=0.05):
                where = "" if keys is None else " with a sliding window"
                return f"gives {name} that differs from SDPA's by {float((a - b).detach().abs().max()):.1e}{where}"
    return ""
