"""The LM head of a causal LM, in the form that the linear losses take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import UserError
from ..common.seeds import generator


@dataclass(frozen=True)
class LmHead:
    """An LM head: logits = cap(scale * hidden @ weight^T + bias), where cap(z) = softcap * tanh(z / softcap).

    weight: (V, H). bias: (V,), None for none. scale: factor of the hidden states. softcap: bound of the logits, None
    for none. dtype: hidden states are rounded to it, as autocast would.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None
    dtype: torch.dtype


def lm_head(model: Any, autocast: torch.dtype | None = None) -> LmHead:
    """Read the LM head of a model: its linear layer, Cohere's or Granite's scale, and Gemma's softcap.

    autocast: dtype of the forward pass, None for that of the weights. Raises UserError if the head is not linear.
    """
    linear, text = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(linear, nn.Linear):
        raise UserError(f"model.path: {type(model).__name__} has no linear LM head; got {type(linear).__name__}")
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1.0)
    softcap, dtype = getattr(text, "final_logit_softcapping", None), autocast or linear.weight.dtype
    return LmHead(linear.weight, linear.bias, float(scale), softcap, dtype)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the logits of `lm_head` with the model's own on a few tokens. Raises UserError if they differ."""
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
