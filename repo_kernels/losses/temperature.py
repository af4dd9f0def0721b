"""The temperature of a call: a scalar, which is one for all rows, or a tensor with one for each row or sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends.interface import compute_dtype, device_scalar
from ..checks import LOGITS_DTYPES, Scalar, check_scalar, check_tensor, is_column, number
from ..tensor_kinds import check_kind, check_memory, makers_like


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


def statistics_temperature(temperature: Scalar, source: Tensor) -> Tensor:
    """Check a temperature and return it as a backend's `statistics` take it: 0-d or (N,), of the compute dtype.

    Args:
        temperature: a scalar > 0, or a tensor of a floating dtype: leading shape or, with (B, L) rows, (B,) or (B, 1).
        source: logits or hidden states; they give leading shape, compute dtype and device.

    Raises:
        TypeError, ValueError: it has a wrong type, dtype, shape or device, or is a number out of range.
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
    check_memory(temperature=temperature)  # which the conversion reads
    values = temperature.detach().to(dtype)
    rows = values if tuple(values.shape) == leading else values[:, None].expand(leading)
    return rows.reshape(-1)
