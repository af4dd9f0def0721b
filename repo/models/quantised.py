"""Quantised weights: recognise them, and keep those of 4 bits in the form whose gradients are right."""

from __future__ import annotations

from typing import Any


def quantisation(model: Any) -> str:
    """Name the method by which a model's weights are quantised, e.g. bitsandbytes; "" if they are not."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return ""
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def keep_unpacked(model: Any) -> None:
    """Keep the 4-bit layers of bitsandbytes in train mode, which changes nothing else, since they have no dropout.

    In eval mode on a CPU they pack their weights for inference, and the backward pass then reads them wrongly.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes"):
            module.train()
