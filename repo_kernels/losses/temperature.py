"""The temperature of a call: a scalar, which is one for all rows, or a tensor with one for each row or sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.codes import IGNORED
from ..backends.eager.dense import row_sequences
from ..backends.interface import RowArguments, compute_dtype, device_scalar
from ..checks import (
    FLOAT32_MAX,
    FLOAT32_TINY,
    LOGITS_DTYPES,
    Scalar,
    check_scalar,
    check_tensor,
    is_at_hand,
    is_column,
    number,
)
from ..tensor_kinds import check_kind, check_memory, makers_like

TAKES = "> 0 and a normal number in float32"


def is_by_row(temperature: object) -> bool:
    """Return whether it is a tensor with dimensions, and so no scalar."""
    return isinstance(temperature, Tensor) and temperature.ndim > 0


def refuse_gradient(temperature: Scalar) -> None:
    """Raise ValueError for a temperature whose gradient, or derivative along a tangent, is asked for: there is none."""
    if isinstance(temperature, Tensor) and (
        (temperature.requires_grad and torch.is_grad_enabled()) or _has_tangent(temperature)
    ):
        raise ValueError("temperature gets no gradient; got a tensor that asks for one: pass temperature.detach()")


def _has_tangent(value: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def refuse_unusable(values: Tensor, by_row: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError for a temperature of a live row that is not > 0 and finite; looked at where nothing waits.

    Args:
        values: the temperatures by row or sequence.
        by_row: computes those of the rows, (N,), and which rows are live, (N,) bool; called if a value is unusable.
    """
    if not is_at_hand(values):
        return
    check_memory(temperature=values)
    if _usable(values).all():
        return
    rows, live = by_row()
    wrong = live & ~_usable(rows)
    if wrong.any():
        row = int(wrong.int().argmax())
        raise ValueError(f"temperature of a live row must be {TAKES}; got {rows[row].item():g} in row {row}")


def _usable(values: Tensor) -> Tensor:
    return (values >= FLOAT32_TINY) & (values <= FLOAT32_MAX)


def temperatures_of_rows(arguments: RowArguments) -> tuple[Tensor, Tensor]:
    """Return the temperatures of the rows of a loss that has them, (N,), and which rows are live, (N,) bool."""
    values, (ids, sequence) = arguments.temperatures, row_sequences(arguments)
    assert values is not None
    rows = values.reshape(-1) if tuple(values.shape) == arguments.leading else values[sequence]
    return rows, ids != IGNORED


def statistics_temperature(temperature: Scalar, ids: Tensor, source: Tensor) -> Tensor:
    """Check a temperature and return it as a backend's `statistics` take it: 0-d or (N,), of the compute dtype.

    Args:
        temperature: a scalar > 0, or a tensor of a floating dtype: leading shape or, with (B, L) rows, (B,) or (B, 1).
        ids: (N,) int64, IGNORED on dead rows.
        source: logits or hidden states; they give leading shape, compute dtype and device.

    Raises:
        TypeError, ValueError: it has a wrong type, dtype, shape, device or value.
    """
    refuse_gradient(temperature)
    dtype = compute_dtype(source)
    if not (isinstance(temperature, Tensor) and temperature.ndim):
        check_scalar("temperature", temperature, lambda x: x > 0, "> 0")
        if isinstance(temperature, Tensor):
            check_kind("temperature", temperature, source)
        with makers_like(source):
            return device_scalar(number(temperature), dtype, source.device)
    leading = tuple(source.shape[:-1])
    if is_column(temperature) and len(leading) == 2 and tuple(temperature.shape) != leading:
        temperature = temperature.squeeze(1)
    check_tensor("temperature", temperature, (leading, leading[:1]), LOGITS_DTYPES, source)
    check_memory(temperature=temperature)
    values = temperature.detach().to(dtype)
    rows = values if tuple(values.shape) == leading else values[:, None].expand(leading)
    rows = rows.reshape(-1)
    refuse_unusable(rows, lambda: (rows, ids != IGNORED))
    return rows
