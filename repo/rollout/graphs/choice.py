"""The choice of the way in which a model computes a step in static buffers, by a trial of each way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ...common.config_fields import is_length_dependent
from ...common.errors import first_line
from ...data.sequences import make_sequences
from ...models.layers import uncompiled
from ...models.layout import relative_difference
from ...models.policy import Policy
from ..fused_decoder import why_not_llama
from ..kv_cache import GrowingDecoder
from .buffers import Buffers
from .decoder import StaticDecoder, Step
from .steps import AttentionStep, MaskedStep, StackStep, joined_layers
from .weights import DecodeWeights

NAMES = (StackStep.name, AttentionStep.name, MaskedStep.name)  # the fastest first
JOINED_SHARE = 1 / 16  # of the device's memory that second copies of weights may take


@dataclass(frozen=True)
class Choice:
    """The way in which a model computes a step.

    name: of NAMES, "" if it needs a growing cache. why: what is wrong with the faster ways, "" for the first.
    """

    name: str
    why: str

    def describe(self) -> str:
        """Describe a way that was found in one line."""
        return f"CUDA graphs over a static KV cache, {self.name}" + f" ({self.why})" * bool(self.why)


_chosen: WeakKeyDictionary[nn.Module, Choice] = WeakKeyDictionary()


def choose_step(policy: Policy) -> Choice:
    """Return the first way whose logits are those of a growing cache. Kept for each model.

    policy: inside its `running()` context, as in a rollout. Compiled layers run uncompiled.
    """
    if policy.model not in _chosen:
        with uncompiled(policy.model):
            _chosen[policy.model] = _choose(policy)
    return _chosen[policy.model]


def _choose(policy: Policy) -> Choice:
    """Try the ways one after another."""
    model = policy.model
    if not getattr(model, "_can_compile_fullgraph", False):
        return Choice("", "the model's step has no fixed shape")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        return Choice("", "not every layer has full attention")
    if is_length_dependent(model):
        return Choice("", "its rotary embedding looks at the length")  # on the host, which a graph cannot
    reasons: list[str] = []
    for name in NAMES:
        if why := _why_not(policy, name):
            reasons.append(f"no {name}: {why}")
        else:
            return Choice(name, "; ".join(reasons))
    return Choice("", "; ".join(reasons))


def _why_not(policy: Policy, name: str) -> str:
    """Return why a model does not decode in this way, "" if it does."""
    if name == StackStep.name and (why := why_not_llama(policy.model) or _why_not_joined(policy)):
        return why
    try:
        difference, scale = try_step(policy, name)
    except Exception as error:  # models and compilers raise errors of many types
        return first_line(error)
    return "" if difference < scale else f"its logits would differ by {difference:.1e}"


def _why_not_joined(policy: Policy) -> str:
    """Return why the weights of fused layers are not copied, "" if they are.

    Without autocast they would exist twice; under autocast every way needs a copy.
    """
    if policy.device.type != "cuda" or _cast(policy.model) is not None:
        return ""
    copied = sum(layer.weight.nbytes for group in joined_layers(policy.model) for layer in group)
    if copied <= JOINED_SHARE * torch.cuda.get_device_properties(policy.device).total_memory:
        return ""
    return f"copies of its weights would take {copied / 1e9:.1f} GB"


@torch.no_grad()
def try_step(policy: Policy, name: str) -> tuple[float, float]:
    """Decode a few tokens with a growing cache and in static buffers; return the difference and what it may be.

    The logits differ for models that compute distances from a 2-D mask, or whose attention takes more arguments than
    those of `cached_attention`; no config field shows either.
    """
    model = policy.model
    prefix = make_sequences([[5, 6, 7, 8, 9], [8, 4, 9]], [[], []], policy.pad_id).to(policy.device)
    tokens = torch.tensor([5, 9, 6, 7], device=policy.device)
    weights = make_weights(name, model)
    buffers = Buffers(4, 8, compute_dtype(model), policy.device)
    growing = GrowingDecoder(model, 3)
    static = StaticDecoder(model, make_step(name, model, weights), buffers, None)
    expected, got = [growing.start(prefix, 2)], [static.start(prefix, 2)]
    for _ in range(2):
        expected.append(growing.step(tokens))
        got.append(static.step(tokens))
    difference = relative_difference(torch.cat(got), torch.cat(expected))
    return difference, 1e-4 if expected[0].dtype == torch.float32 else 0.05


def compute_dtype(model: Any) -> torch.dtype:
    """Return the dtype of keys and values: that of autocast, or of the weights without it."""
    return _cast(model) or model.dtype


def _cast(model: Any) -> torch.dtype | None:
    """Return the dtype of autocast, None if it is off."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def make_weights(name: str, model: Any) -> DecodeWeights:
    """Copy the weights that a way reads."""
    return DecodeWeights(model, _cast(model), joined_layers(model) if name == StackStep.name else ())


def make_step(name: str, model: Any, weights: DecodeWeights) -> Step:
    """Make the step of a way from the copies of the weights."""
    if name == StackStep.name:
        return StackStep(model, weights)
    return AttentionStep(model) if name == AttentionStep.name else MaskedStep(model)
