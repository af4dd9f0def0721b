"""LoraHead: the head of a model that is trained through a low-rank adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...backends.interface import compute_dtype, device_scalar
from ...checks import Scalar, check_head, check_scalar, check_tensor, describe, number, weight_dtypes
from ...tensor_kinds import makers_like


@dataclass(frozen=True, eq=False, repr=False)
class LoraHead:
    """The weight base + scaling * lora_B @ lora_A of a head with a LoRA adapter (arXiv:2106.09685), never formed.

    `linear_repo_loss`, `LinearRepoLoss` and `linear_selective_log_softmax` take it in place of a weight. They are
    differentiable in lora_A and lora_B, with no memory for a gradient of the base. There is no dropout. The names are
    those of PEFT, whose layer `lm_head` is given as::

        head = LoraHead(
            lm_head.base_layer.weight, lm_head.lora_A["default"].weight, lm_head.lora_B["default"].weight,
            lm_head.scaling["default"],
        )

    The tensors are checked at the call that takes the head.

    Args:
        base: (V, H), dtype of the hidden states, or fp32 for bf16 and fp16 hidden states; it is frozen. One that
            requires grad is a ValueError where gradients are recorded.
        lora_A: (r, H), r >= 1, same choice of dtypes.
        lora_B: (V, r), same choice of dtypes.
        scaling: alpha / r, or alpha / sqrt(r) of rsLoRA: a finite float, or a 0-d tensor, whose value is not checked
            and which gets no gradient.
    """

    base: Tensor
    lora_A: Tensor  # noqa: N815
    lora_B: Tensor  # noqa: N815
    scaling: Scalar

    @property
    def shape(self) -> torch.Size:
        """The shape (V, H) of the weight."""
        return self.base.shape


HEAD_NAMES = ("hidden", "weight", "bias", "lora_A", "lora_B", "scaling")
LEAVES = 5  # the tensors up to lora_B, which may get a gradient


class HeadTensors(NamedTuple):
    """The hidden states and the head of one call, checked; the first LEAVES may get a gradient.

    weight is the base of a LoraHead, whose other tensors are None for a dense head. scaling is 0-d, compute dtype.
    Messages call them by HEAD_NAMES.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: Tensor | None = None


def head_tensors(hidden: Tensor, weight: Tensor | LoraHead, bias: Tensor | None) -> HeadTensors:
    """Check hidden states and a head, as `check_head`, and return their tensors."""
    if not isinstance(weight, LoraHead):
        check_head("", hidden, weight, bias)
        return HeadTensors(hidden, weight, bias)
    head, name = weight, "weight.base"
    check_head("", hidden, head.base, bias, weight_name=name)
    if head.base.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must be frozen, since a LoraHead gives it no gradient; got one that requires grad: pass "
            "base.detach() to train lora_A and lora_B alone, or base + scaling * lora_B @ lora_A as the weight"
        )
    (vocabulary, width), rank = head.base.shape, _rank(head.lora_A)
    dtypes = weight_dtypes(hidden)
    check_tensor("weight.lora_A", head.lora_A, ((rank, width),), dtypes, hidden)
    check_tensor("weight.lora_B", head.lora_B, ((vocabulary, rank),), dtypes, hidden)
    check_scalar("weight.scaling", head.scaling, lambda x: True, "finite")
    with makers_like(hidden):
        scaling = device_scalar(number(head.scaling), compute_dtype(hidden), hidden.device)
    return HeadTensors(hidden, head.base, bias, head.lora_A, head.lora_B, scaling)


def _rank(value: object) -> int:
    """Return r, the rows of lora_A; 1 for what `check_tensor` refuses in any case."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return 1
    if not value.numel():
        raise ValueError(f"weight.lora_A must have shape (r, H) with r >= 1; got {describe(value)}")
    return value.shape[0]
