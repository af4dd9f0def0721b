"""Fast layers: the faster forms of a policy's layers in training, each taken if a trial finds it right.

The forms are working copies of the weights, compiled decoder layers, and where those do not work Liger's norms, rotary
embeddings and SwiGLU. The trial is a forward and a backward pass over
short packed or padded rows; it also compiles what the first update would otherwise compile.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Literal

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from repo_kernels.layers import liger_layers

from ...common.errors import first_line
from ..hidden_states import trunk_states
from ..layers import compile_layers, decoder_layers, uncompile_layers
from ..layout import probe_rows
from ..lm_head import trunk_of
from ..policy import Policy

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}  # relative, of states and gradients


def with_fast_layers(policy: Policy, compiles: bool | Literal["auto"], sharded: bool = False) -> Policy:
    """Return a policy that trains with the faster forms of its layers; `layers` says which, and why not the others.

    compiles: model.compile; "auto" compiles on CUDA. sharded: FSDP will split the weights; it casts them itself, and
    its layers are not compiled by "auto".
    """
    if sharded:
        return dataclasses.replace(policy, layers="compiled" if policy.compiled else "not compiled, since sharded")
    notes: list[str] = []
    if policy.dtype != torch.float32:
        policy, note = with_copies(policy)
        notes.append(note)
    if policy.compiled:
        notes.insert(0, "compiled")
    elif compiles == "auto" and policy.device.type == "cuda":
        policy, note = with_compiled_layers(policy)
        notes.insert(0, note)
    if policy.device.type == "cuda" and not policy.compiled:
        policy, note = with_liger(policy)
        notes.append(note)
    return dataclasses.replace(policy, layers=", ".join(notes))


def with_copies(policy: Policy) -> tuple[Policy, str]:
    """Let a policy use working copies if states and gradients stay what they are without; returns words for it too."""
    dtype = str(policy.dtype).removeprefix("torch.")
    copied = dataclasses.replace(policy, copied=True)
    if why := _changes(copied, _probe(policy)):
        return policy, f"weights cast in every pass: with copies in {dtype} the trial {why}"
    return copied, f"weights cast to {dtype} once per optimiser step"


def with_compiled_layers(policy: Policy) -> tuple[Policy, str]:
    """Compile a policy's decoder layers if a trial works; returns words for it too."""
    if not decoder_layers(policy.model):
        return policy, f"not compiled: {type(policy.model).__name__} has no decoder layers"
    expected, begun, graphs = _probe(policy), time.perf_counter(), counters["stats"]["unique_graphs"]
    compile_layers(policy.model)
    compiled = dataclasses.replace(policy, compiled=True)
    if why := _changes(compiled, expected):
        uncompile_layers(policy.model)
        return policy, f"not compiled: torch.compile {why}"
    graphs = counters["stats"]["unique_graphs"] - graphs
    return compiled, f"compiled in {time.perf_counter() - begun:.0f} s, {graphs} graphs"


def with_liger(policy: Policy) -> tuple[Policy, str]:
    """Let a policy's layers use Liger if states and gradients stay what they are; returns words for it too."""
    fused = dataclasses.replace(policy, liger=True)
    if why := liger_layers.why_not() or _changes(fused, _probe(policy)):
        return policy, f"norms, rotary and SwiGLU by PyTorch: Liger {why}"
    return fused, "norms, rotary and SwiGLU by Liger"


def _changes(policy: Policy, expected: list[Tensor]) -> str:
    """Say how a policy's states or gradients on the trial's rows differ from the expected ones; "" if they do not."""
    try:
        computed = _probe(policy)
    except Exception as error:  # compilers and models raise errors of many types
        return f"fails: {first_line(getattr(error, 'inner_exception', error))}"  # torch.compile wraps its backend's
    difference = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in zip(computed, expected, strict=True))
    if difference < TOLERANCE[policy.dtype]:
        return ""
    return f"changes states or gradients by {difference:.1e}"


@torch.enable_grad()
def _probe(policy: Policy) -> list[Tensor]:
    """Compute states and gradients of the trial's rows: last states, gradients of what the first layer trains.

    Gradients pass through every layer to get there. Those of one layer are compared because all would take the memory
    of the weights again.
    """
    packed = probe_rows(policy.model, policy.attention).to(policy.device)
    first = next(iter(decoder_layers(policy.model)), policy.model)
    with policy.copies(), policy.recomputing():
        trained = [p for p in first.parameters() if p.requires_grad]
        with policy.running():
            (states,) = trunk_states(trunk_of(policy.model), packed, kernel=policy.attention.kernel)
        direction = torch.arange(states.numel(), device=states.device).view_as(states).sin().to(states.dtype)
        gradients = torch.autograd.grad((states * direction).sum(), trained, materialize_grads=True)
    return [x.detach().float() for x in (states, *gradients)]
