"""Quantised weights: recognise them, and keep those of 4 bits in the form whose gradients are right."""

from __future__ import annotations

from typing import Any

from ..common.errors import UserError


def quantisation(shape: Any) -> str:
    """Name the method that quantised a model's weights, e.g. bitsandbytes; "" if none did. shape: its config."""
    config = getattr(shape, "quantization_config", None)
    if config is None:
        return ""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def require_trainable(shape: Any, lora_rank: int, path: str) -> None:
    """Raise UserError if quantised weights would be trained themselves.

    shape: a model's config. lora_rank: 0 to train the weights. path: of the model, for the message.
    """
    if not lora_rank and (quantised := quantisation(shape)):
        raise UserError(
            f"model.path: the weights of {path!r} are quantised ({quantised}) and cannot be trained themselves; "
            "set model.lora_rank to train adapters beside them, or load a model that is not quantised"
        )


def keep_unpacked(model: Any) -> None:
    """Keep the 4-bit layers of bitsandbytes in train mode, which changes nothing else, since they have no dropout.

    In eval mode on a CPU they pack their weights for inference, and the backward pass then reads them wrongly.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
            module.train()
