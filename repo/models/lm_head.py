"""The LM head of a causal LM, in the form that the linear losses take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..common.config_fields import config_field
from ..common.errors import UserError, first_line
from ..data.token_ids import plain_ids

SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


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
    scale = config_field(text, "logit_scale") or 1 / (config_field(text, "logits_scaling") or 1.0)
    softcap = next((cap for name in SOFTCAPS if (cap := config_field(text, name)) is not None), None)
    dtype = autocast or linear.weight.dtype
    return LmHead(linear.weight, linear.bias, float(scale), softcap, dtype)


def trunk_of(model: Any) -> Any:
    """Return the layers of a causal LM without its head; a trunk is returned as it is."""
    trunk = model.base_model
    # Llama 4 names its trunk otherwise than its prefix says, so that base_model is the model itself
    return getattr(model, "model", model) if trunk is model and model.get_output_embeddings() is not None else trunk


@torch.no_grad()
def check_head(model: Any) -> None:
    """Compare the logits of `lm_head` with the model's own on a few tokens. Raises UserError if they differ."""
    head, ids = lm_head(model), plain_ids(model, 1, 5, "head probe").to(model.device)
    try:
        hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state
        expected = model(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # models raise errors of many types
        raise UserError(
            f"model.path: {type(model).__name__} cannot be run on token ids alone: {first_line(error)}"
        ) from error
    logits = nn.functional.linear(hidden * head.scale, head.weight.to(hidden.dtype), head.bias).float()
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 0.05
    if expected.shape != logits.shape or (logits - expected).abs().max() > tolerance * expected.abs().max():
        raise UserError(
            f"model.path: the logits of {type(model).__name__} are not its last states times its output embeddings "
            "(with the scale and softcap of its config); such models cannot be trained here"
        )
