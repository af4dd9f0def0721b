"""Forward: the states that a causal LM or a trunk gives to prompts and responses, and the LM head that reads them."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from repo_kernels import linear_selective_log_softmax

from ..common.errors import UserError
from ..common.seeds import generator
from ..data.packing import Packed, take_rows
from .attention import using_packed


@dataclass(frozen=True)
class Head:
    """The LM head as the losses take it: logits = softcap(scale * hidden @ weight^T + bias).

    weight: (V, H); bias: (V,) or None; softcap: None for none; dtype: what hidden is rounded to, as autocast would.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype


@dataclass(frozen=True)
class States:
    """What a forward says about packed responses. hidden: (T, H) after each layer, or after the last alone; the
    embedding comes first. head: None for a trunk."""

    packed: Packed
    hidden: tuple[Tensor, ...]
    head: Head | None

    def before(self, layer: int = -1) -> Tensor:
        """(N, H): the states that predict each response token."""
        return take_rows(self.hidden[layer], self.packed.rows)

    def of(self, layer: int = -1) -> Tensor:
        """(N, H): the states of each response token, in a layout that holds the last ones."""
        assert self.packed.inputs is not None
        return self.hidden[layer].index_select(0, self.packed.inputs)

    def head_arguments(self) -> dict[str, Any]:
        """hidden, weight, bias and softcap of the linear losses, at the states that predict response tokens."""
        assert self.head is not None
        hidden, head = self.before().to(self.head.dtype), self.head
        hidden = hidden if head.scale == 1 else hidden * head.scale
        return {"hidden": hidden, "weight": head.weight, "bias": head.bias, "softcap": head.softcap}

    def logps(self, temperature: float) -> Tensor:
        """(N,) fp32 log-probabilities of the response tokens."""
        found = linear_selective_log_softmax(
            token_ids=self.packed.token_ids, temperature=temperature, **self.head_arguments()
        )
        assert isinstance(found, Tensor)
        return found


def trunk_states(trunk: Any, packed: Packed, layers: bool = False) -> tuple[Tensor, ...]:
    """The (T, H) states of packed or padded rows; layers: of every layer, beginning with the embedding."""
    arguments: dict[str, Any] = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    if "position_ids" not in inspect.signature(trunk.forward).parameters:
        del arguments["position_ids"]
    with nullcontext() if packed.segments is None else using_packed(trunk):
        reads = "attention_mask" if packed.segments is None else "segments"
        arguments[reads] = getattr(packed, reads)
        out = trunk(**arguments, use_cache=False, output_hidden_states=layers)
    found = out.hidden_states if layers else (out.last_hidden_state,)
    return tuple(x.reshape(-1, x.shape[-1]) for x in found)


def lm_head(model: Any, autocast: torch.dtype | None = None) -> Head:
    """The head by the model's config: a linear layer, with Cohere's or Granite's scale and Gemma's softcap."""
    linear, text = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(linear, nn.Linear):
        raise UserError(f"model.path: {type(model).__name__} has no linear LM head; got {type(linear).__name__}")
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1.0)
    softcap, dtype = getattr(text, "final_logit_softcapping", None), autocast or linear.weight.dtype
    return Head(linear.weight, linear.bias, float(scale), softcap, dtype)


@torch.no_grad()
def check_head(model: Any) -> None:
    """UserError unless lm_head says what the model's own logits are: it is tried on a few tokens."""
    head = lm_head(model)
    ids = torch.randint(0, head.weight.shape[0], (1, 5), generator=generator("head probe"))
    hidden = model.base_model(input_ids=ids.to(model.device), use_cache=False).last_hidden_state
    logits = nn.functional.linear(hidden * head.scale, head.weight.to(hidden.dtype), head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    expected = model(input_ids=ids.to(model.device), use_cache=False).logits.float()
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.05
    if expected.shape != logits.shape or (logits - expected).abs().max() > tolerance * expected.abs().max():
        raise UserError(
            f"model.path: the logits of {type(model).__name__} are not its last states times its output embeddings "
            "(with the scale and softcap of its config); such models cannot be trained here"
        )
