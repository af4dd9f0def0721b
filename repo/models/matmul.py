"""Matrix products: the type in which the linear layers of an fp32 model multiply on a CPU, chosen when it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repo_kernels.layers.bf16_linear import INSTRUCTIONS, available, bf16_linears

from ..common.errors import UserError
from ..config.schema import ModelConfig
from ..data.token_ids import plain_ids
from .lm_head import trunk_of

NARROWEST = 256  # hidden width of a model; bfloat16 gains nothing below
TOKENS = 48  # of the probe
LIMIT = 0.1  # nats per token, mean of the absolute differences that the probe finds


@dataclass(frozen=True)
class Matmul:
    """The type of the products of linear layers.

    half: they multiply in bfloat16, although weights and states are fp32. why: why they do not, "" if they do or if
    that was asked for. gap: mean absolute difference of log-probabilities from fp32 in nats, as the probe found it.
    """

    half: bool = False
    why: str = ""
    gap: float = 0.0

    def describe(self) -> str:
        """Describe the choice in one line."""
        if not self.half:
            return "matrix products: float32" + (f" ({self.why})" if self.why else "")
        return f"matrix products: bfloat16 on the CPU (log-probs within {self.gap:.3f} nats a token of float32, mean)"


def choose_matmul(model: Any, config: ModelConfig, device: torch.device, trainable: bool) -> Matmul | None:
    """Choose the type of the products as model.matmul_dtype says; None where the model's own type decides.

    model: loaded, on `device`, in eval mode. trainable: it will be trained, and compiled if the config says so.

    Raises UserError if bfloat16 is asked for and impossible.
    """
    asked = config.matmul_dtype
    if device.type != "cpu" or model.dtype != torch.float32 or config.dtype != "float32":
        return None
    if asked == "float32":
        return Matmul()
    why = _why_not(model, config, trainable)
    if asked == "bfloat16" and why:
        raise UserError(f"model.matmul_dtype must be auto or float32 here, since {why}; got bfloat16")
    if not why and asked == "auto" and model.config.get_text_config().hidden_size < NARROWEST:
        why = f"a hidden width below {NARROWEST} gains nothing from bfloat16"
    if why:
        return Matmul(why=why)
    gap = _gap(model)
    if asked == "auto" and not gap <= LIMIT:
        return Matmul(why=f"bfloat16 changes log-probs by {gap:.2g} nats a token, mean")
    return Matmul(half=True, gap=gap)


def may_round(shape: Any, config: ModelConfig) -> bool:
    """Tell whether a model that is trained would multiply in bfloat16 on a CPU if the probe agrees.

    shape: the model's config, None if it has none.
    """
    if shape is None or config.matmul_dtype == "float32":
        return False
    wide = shape.get_text_config().hidden_size >= NARROWEST
    return not _why_not(None, config, True) and (wide or config.matmul_dtype == "bfloat16")


def _why_not(model: Any, config: ModelConfig, trainable: bool) -> str:
    """Return the reason why the products cannot be in bfloat16, "" if they can."""
    if not available():
        return f"this CPU has none of {', '.join(sorted(INSTRUCTIONS))}"
    if config.shard != 1:
        return "model.shard is not 1"
    if trainable and config.compile is True:  # "auto" does not compile on a CPU
        return "model.compile is on"
    return "its weights are quantised" if getattr(model, "is_quantized", False) else ""


@torch.no_grad()
def _gap(model: Any) -> float:
    """Compute how far bfloat16 moves the log-probabilities of a few random tokens, mean in nats."""
    ids = plain_ids(model, 1, TOKENS, "product probe").to(model.device)
    exact = _logps(model, ids)
    with bf16_linears(trunk_of(model)):
        return float((_logps(model, ids) - exact).abs().mean())


def _logps(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])
