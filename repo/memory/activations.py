"""Activations: what one micro-batch of the update holds at its peak.

A forward and backward pass of the model's own code runs on "meta" tensors, one decoder layer of each kind at a time,
while the bytes that live are counted. So the figures hold for any architecture, with adapters, autocast and
recomputation, as long as nothing in a layer depends on values.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from repo_kernels.layers.bf16_linear import bf16_linears, wide_linears
from repo_kernels.layers.fused_layers import fused_layers
from repo_kernels.losses.heads.chunks import Budget, HeadSizes

from ..data.packing import Packed
from ..data.segments import take_rows
from ..models.fast_layers.working_copies import working_copies
from ..models.layers import decoder_layers, recomputed
from .live_bytes import LiveBytes
from .stand_ins import KERNELS, AttentionKernel, Autocast, Head, Pattern, sized
from .twin import Kind, kinds_of

MOST_CALLS = 3000  # operators of one layer; a state-space model that loops over tokens would take minutes


@dataclass(frozen=True)
class Pass:
    """How the update runs a model.

    device: its type, "cpu" or "cuda". kernel: of attention. half: dtype of autocast, None for none.
    recomputes: gradient checkpointing is on. fused: repo_kernels replaces norms, rotary embedding and gated MLPs.
    rounds: it multiplies fp32 linear layers in bfloat16, by copies of their weights. copied: dtype in which it has
    copies of trained weights for the whole optimiser step, None for none.
    budget, head: of the chunks of logits; None for a trunk without a head.
    """

    device: str
    kernel: AttentionKernel
    half: torch.dtype | None
    recomputes: bool
    fused: bool
    rounds: bool
    budget: Budget | None
    head: HeadSizes | None
    copied: torch.dtype | None = None


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch adds to weights and their gradients.

    count: number of decoder layers. layers: what all of them keep for the backward pass. attention: part of it that
    attention keeps. copies: half-precision copies of trained weights, which the backward pass needs. released: those
    that are freed before it, because it makes them anew. outside: what is kept before and after the layers.
    working: what the largest backward pass of one layer, or the head, holds beyond that at its peak.
    """

    count: int
    layers: int
    attention: int
    copies: int
    released: int
    outside: int
    working: int

    @property
    def peak(self) -> int:
        """Bytes at the peak of the forward and backward pass."""
        return self.layers + max(self.released, self.copies + self.outside + self.working)


def activations_of(model: nn.Module, packed: Packed, how: Pass) -> Activations:
    """Compute what a micro-batch of a causal LM or a trunk holds.

    model: on any device. packed: the inputs, on the CPU.

    Raises Exception of any type, with its reason, if the model cannot be run on "meta".
    """
    return combine([(kind.count, run_kind(kind, packed, how)) for kind in kinds_of(model)])


def combine(parts: list[tuple[int, Activations]]) -> Activations:
    """Add up kinds of layers, given as (number of such layers, activations of one)."""

    def total(name: str) -> int:
        return sum(count * getattr(part, name) for count, part in parts)

    largest = max((part for _, part in parts), key=lambda part: part.outside + part.working)
    return replace(largest, **{name: total(name) for name in ("count", "layers", "attention", "copies", "released")})


def run_kind(kind: Kind, packed: Packed, how: Pass) -> Activations:
    """Run a twin with one layer forward and backward, and count."""
    trunk, part = kind.trunk, packed.to(torch.device("meta"))
    pattern = Pattern(None if part.segments is None else part.segments.keys, how.kernel)
    (layer,) = decoder_layers(trunk)
    live = LiveBytes(MOST_CALLS, promotes=how.device == "cpu", kernels=KERNELS)
    marks: list[int] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        if not states.requires_grad:  # as behind a frozen embedding; but most layers are behind another layer
            states.requires_grad_()
        marks.append(live.now)

    hooks = [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.register_forward_hook(lambda *_: marks.append(live.now)),
    ]
    autocast = None if how.half is None else Autocast(how.half)
    if autocast is not None:
        layer.forward = autocast.around(layer.forward)
    with ExitStack() as stack:
        stack.enter_context(sized(trunk, pattern))
        stack.enter_context(fused_layers(trunk) if how.fused else nullcontext())
        stack.enter_context(bf16_linears(trunk) if how.rounds else nullcontext())
        stack.enter_context(recomputed(trunk) if how.recomputes else nullcontext())
        apart = 0
        if how.copied is not None:
            stack.enter_context(working_copies(trunk, how.copied))
            apart = sum(p.nbytes for p in layer.parameters() if p.requires_grad and p.dtype == how.copied)
        stack.enter_context(live)
        inputs = {"input_ids": part.input_ids, "position_ids": part.position_ids}
        if "position_ids" not in inspect.signature(trunk.forward).parameters:
            del inputs["position_ids"]
        states = trunk(**inputs, use_cache=False).last_hidden_state
        copies = 0 if autocast is None else autocast.release()
        stay = sum(2 * m.weight.numel() for m in wide_linears(layer)) if how.rounds else 0
        loss = _loss(kind, states, part.rows, how, live)
        del states
        attention, kept = pattern.saved, live.now
        loss.backward()
    for hook in hooks:
        hook.remove()
    layers = marks[1] - marks[0] - copies - stay
    if how.recomputes:  # autocast casts the weights of one layer at a time again
        return Activations(1, layers, 0, stay + apart, copies, kept - layers - stay, live.peak - kept)
    copies += stay
    return Activations(1, layers, attention, copies + apart, 0, kept - layers - copies, live.peak - kept)


def _loss(kind: Kind, states: Tensor, rows: Tensor, how: Pass, live: LiveBytes) -> Tensor:
    """Compute what stands for the loss. states: of the last layer, rows: which of them predict a token."""
    hidden = take_rows(states.reshape(-1, states.shape[-1]), rows)
    if kind.head is None or how.head is None or how.budget is None:
        return hidden.float().sum()
    return Head.apply(hidden.to(how.half or kind.head.dtype), kind.head, how.budget, how.head, live)
