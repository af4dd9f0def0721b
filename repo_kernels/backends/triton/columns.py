"""The arguments of a loss as the kernels take them: pointers, strides and bits that say which are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codes import SCALARS
from ..interface import Loss, Scalars, compute_dtype, device_scalar
from .device import loss_arguments as bits

VALUES = (
    "reward_advantages",
    "cost_advantages",
    "costs",
    "cost_limits",
    "cost_baselines",
    "old_logps",
    "ref_logps",
    "importance_weights",
    "temperatures",
)
GIVEN = {
    "response_mask": bits.MASK.value,
    "cu_seqlens": bits.BOUNDS.value,
    "costs": bits.COSTS.value,
    "cost_limits": bits.COST_LIMITS.value,
    "cost_baselines": bits.BASELINES.value,
    "importance_weights": bits.IMPORTANCE.value,
    "temperatures": bits.TEMPERATURES.value,
}


@dataclass(frozen=True, eq=False)
class Columns:
    """The tensors of a loss with their strides. A tensor that is absent is replaced by one of its type.

    Args:
        ids, mask: (tensor, stride of sequences, stride of tokens).
        bounds: (S + 1,) int32.
        values: the same as ids for each name of VALUES, in one flat list.
        given: bits of `loss_arguments`.
        length: of a sequence: L of (B, L), at least 1; 1 of packed rows, for which `bounds` give it if there are any.
    """

    ids: tuple[Tensor, int, int]
    mask: tuple[Tensor, int, int]
    bounds: Tensor
    values: list[Any]
    given: int
    length: int

    @staticmethod
    def of(loss: Loss, fp32: Tensor, int32: Tensor) -> Columns:
        """Read the arguments of a loss. fp32, int32: stand for absent tensors of these types."""
        arguments = loss.arguments
        leading, packed = arguments.leading, arguments.token_ids.ndim == 1
        given = bits.PACKED.value if packed else 0
        for name, bit in GIVEN.items():
            given |= bit if getattr(arguments, name) is not None else 0
        ids, mask = arguments.token_ids, arguments.response_mask
        values: list[Any] = []
        for name in VALUES:
            value = getattr(arguments, name)
            values += (fp32, 0, 0) if value is None else column(value, leading)
        return Columns(
            column(ids, leading),
            (int32.view(torch.bool), 0, 0) if mask is None else column(mask, leading),
            int32 if arguments.cu_seqlens is None else arguments.cu_seqlens,
            values,
            given,
            1 if packed else max(leading[-1], 1),
        )

    def costs(self) -> list[Any]:
        """Return costs and limits with their strides."""
        first = 3 * VALUES.index("costs")
        return self.values[first : first + 6]


def column(value: Tensor, leading: tuple[int, ...]) -> tuple[Tensor, int, int]:
    """Return a tensor with its strides by sequence and by token."""
    if tuple(value.shape) != leading:
        return value, value.stride(0), 0
    return (value, 0, value.stride(0)) if value.ndim == 1 else (value, value.stride(0), value.stride(1))


def split_scalars(scalars: Scalars, like: Tensor) -> tuple[list[float], list[Tensor], int]:
    """Return the scalars as numbers, as tensors, and bits that say which are tensors.

    like: fp32 on the device; stands for the tensor of a number.
    """
    if isinstance(scalars, Tensor):
        return [0.0] * len(SCALARS), list(scalars.unbind(0)), (1 << len(SCALARS)) - 1
    numbers, tensors, which = [], [], 0
    for place, value in enumerate(scalars):
        given = isinstance(value, Tensor)
        numbers.append(0.0 if isinstance(value, Tensor) else float(value))
        tensors.append(device_scalar(value, compute_dtype(like), like.device) if given else like)
        which |= given << place
    return numbers, tensors, which
