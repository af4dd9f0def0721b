"""Checks of public arguments. An error names the argument, what it got and what it takes.

Values of floats are checked. Values of tensors are not, since reading one makes the host wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tensor_kinds import PLAIN_TYPES, check_kind, check_memory, is_plain, is_traced

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUE_DTYPES = (torch.float32, torch.float64)
ID_DTYPES = (torch.int64, torch.int32)
MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *LOGITS_DTYPES,
)  # fmt: skip
COST_MODES = ("rectified", "split", "lagrangian")
KL_ESTIMATORS = ("k1", "k2", "k3", "full")
SURROGATES = ("clip", "cispo")
RATIO_LEVELS = ("token", "sequence")

FLOAT32_TINY, FLOAT32_MAX = 2.0**-126, 3.4028234663852886e38

Scalar = float | Tensor


def describe(value: object) -> str:
    """Describe a value for an error message: a tensor by dtype, shape and device, anything else by repr and type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{text if len(text) <= 200 else text[:200] + ' ...'} ({type(value).__name__})"


def number(value: Any) -> Any:
    """Return a numpy scalar as Python's number, anything else as it is."""
    return value.item() if isinstance(value, np.number) else value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool; got {describe(value)}")


def check_tensor(
    name: str, value: object, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[torch.dtype, ...], like: Tensor
) -> Tensor:
    """Return the value if it is a tensor of one of these shapes and dtypes on the device of `like`.

    Raises:
        TypeError: it is no tensor, of a kind that is refused (`check_kind`) or of another dtype.
        ValueError: it has another shape or is on another device.
    """
    if isinstance(value, Tensor):
        check_kind(name, value, like)
    if not isinstance(value, Tensor) or value.dtype not in dtypes:
        takes = " or ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))
        raise TypeError(f"{name} must be a tensor of {takes}, shape {_either(shapes)}; got {describe(value)}")
    if tuple(value.shape) not in shapes:
        raise ValueError(f"{name} must have shape {_either(shapes)}; got {describe(value)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} with the logits; got {describe(value)}")
    return value


def _either(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " or ".join(str(s) for s in dict.fromkeys(shapes))


def is_column(value: Tensor) -> bool:
    """Return whether it is (n, 1), and not of a kind that has no shape, which is refused elsewhere."""
    return type(value) in PLAIN_TYPES and not value.is_nested and value.ndim == 2 and value.shape[1] == 1


def check_scalar(name: str, value: Any, accepts: Callable[[float], bool], takes: str) -> None:
    """Check a number: a float that `accepts` takes, finite and not flushed to 0 in fp32, or a 0-d numeric tensor.

    Raises:
        TypeError: it is neither.
        ValueError: the float is out of range, or the tensor has dimensions or no data.
    """
    if isinstance(value, Tensor):
        check_kind(name, value)
        if value.ndim or not (value.is_floating_point() or value.dtype in ID_DTYPES):
            raise ValueError(f"{name} as a tensor must be 0-d and numeric; got {describe(value)}")
        if value.device.type == "meta":
            raise ValueError(f"{name} must be a float or a 0-d tensor with data, {takes}; got {describe(value)}")
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a float or a 0-d tensor, {takes}; got {describe(value)}")
    size: Any = abs(value)
    # Comparisons instead of math.isfinite, which torch.compile cannot trace for a float that varies. It does not ask
    # for 0, which would become a condition of the graph: then 0 would take a graph of its own.
    normal = size <= FLOAT32_MAX and (torch.compiler.is_compiling() or value == 0 or size >= FLOAT32_TINY)
    if not (normal and accepts(value)):  # type: ignore[arg-type]  # numpy's numbers compare as floats do
        raise ValueError(f"{name} must be {takes} and a normal number in float32; got {value!r}")


def check_matrix(name: str, value: object) -> Tensor:
    """Return the value if it is (T, V) or (B, L, V), V >= 1, of a floating dtype, with unit column stride."""
    names = ", ".join(str(d).removeprefix("torch.") for d in LOGITS_DTYPES)
    if isinstance(value, Tensor):
        check_kind(name, value)
    if not isinstance(value, Tensor) or value.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be a tensor of {names}; got {describe(value)}")
    if value.ndim not in (2, 3) or value.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (T, V) or (B, L, V) with V >= 1; got {describe(value)}")
    if value.numel() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name} must have unit stride in its last dimension; got strides {value.stride()}")
    return value


def check_logps(value: object, name: str = "logps") -> Tensor:
    """Return the value if it is (T,) or (B, L) of fp32 or fp64."""
    if isinstance(value, Tensor):
        check_kind(name, value)
    if not isinstance(value, Tensor) or value.dtype not in VALUE_DTYPES:
        raise TypeError(f"{name} must be a tensor of float32 or float64; got {describe(value)}")
    if value.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (T,) or (B, L); got {describe(value)}")
    return value


def check_softcap(softcap: float | None) -> None:
    """Check that softcap is a float > 0 or None."""
    if softcap is not None:
        if isinstance(softcap, Tensor):
            raise TypeError(f"softcap must be a float or None; got {describe(softcap)}")
        check_scalar("softcap", softcap, lambda x: x > 0, "> 0 or None")


def check_live_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise IndexError if one of the live ids, (n,), is outside [0, vocabulary). Waits for a GPU."""
    if ids.numel() and (ids.min() < 0 or ids.max() >= vocabulary):
        worst = ids[(ids < 0) | (ids >= vocabulary)][0].item()
        raise IndexError(f"token_ids of live rows must be in [0, {vocabulary}) or -100; got {worst}")


def check_live_temperatures(temperature: Tensor) -> None:
    """Raise ValueError if one of the temperatures of live rows, (n,), is unusable. Waits for a GPU.

    A temperature of all rows, 0-d, is a scalar, whose value is not looked at.
    """
    if not temperature.ndim or not temperature.numel():
        return
    usable = (temperature >= FLOAT32_TINY) & (temperature <= FLOAT32_MAX)
    if not usable.all():
        worst = temperature[~usable][0].item()
        raise ValueError(f"temperature of live rows must be > 0 and a normal number in float32; got {worst:g}")


def check_mask(mask: Tensor, leading: tuple[int, ...], like: Tensor) -> Tensor:
    """Check that the mask has the leading shape and holds 0 and 1 alone; return it as bool.

    The values are checked where those of cu_seqlens are. Elsewhere any value but 0 counts as 1.
    """
    check_tensor("response_mask", mask, (leading,), MASK_DTYPES, like)
    return as_mask("response_mask", mask)


def as_mask(name: str, mask: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a mask of any dtype as bool.

    name: of the argument. shape: that it must have; None: any. Raises ValueError for another shape and, where the
    values are at hand, for one that is neither 0 nor 1.
    """
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        return mask
    live = mask != 0
    if is_at_hand(mask):
        check_memory(**{name: mask})
        wrong = mask[live & (mask != 1)]
        if wrong.numel():
            raise ValueError(f"{name} must hold 0 and 1 alone; got {wrong[0].item()}")
    return live


def is_at_hand(value: Tensor) -> bool:
    """Return whether reading the values waits for nothing: plain, on the CPU, not traced."""
    return value.device.type == "cpu" and not is_traced() and is_plain(value)


def check_cu_seqlens(cu_seqlens: Tensor, leading: tuple[int, ...], like: Tensor) -> None:
    """Check that cu_seqlens is (B + 1,) int32 and rises within 0 and T, the only entry of `leading`.

    Rows before the first bound and from the last one on are dead. The values are checked on the CPU alone, where
    reading them does not wait, and only if they are at hand: not while torch.compile traces, and not those of a
    FakeTensor.
    """
    if len(leading) != 1:
        raise ValueError(f"cu_seqlens is for packed (T, ...) rows; the rows here have leading shape {leading}")
    if isinstance(cu_seqlens, Tensor):
        check_kind("cu_seqlens", cu_seqlens, like)
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        raise TypeError(f"cu_seqlens must be a tensor of int32, shape (B+1,); got {describe(cu_seqlens)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() == 0:
        raise ValueError(f"cu_seqlens must have shape (B+1,); got {describe(cu_seqlens)}")
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens must be on {like.device} with the logits; got {describe(cu_seqlens)}")
    if is_at_hand(cu_seqlens):
        check_memory(cu_seqlens=cu_seqlens)
        bounds = cu_seqlens.tolist()
        if bounds[0] < 0 or bounds[-1] > leading[0] or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 9 else [*bounds[:7], "...", bounds[-1]]
            raise ValueError(f"cu_seqlens must rise within 0 and T = {leading[0]}; got {shown}")


def check_head(
    prefix: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    leading: tuple[int, ...] | None = None,
    weight_name: str = "weight",
) -> None:
    """Check the hidden states and the weights of a linear head.

    Weights may be fp32 with bf16 or fp16 hidden states, as in a model trained under autocast.

    Args:
        prefix: put before the names in messages.
        hidden: (T, H) or (B, L, H), unit column stride.
        weight: (V, H), V >= 1, dtype of hidden or fp32.
        bias: (V,), same choice of dtypes, or None.
        leading: the leading shape that hidden must have, or None for any.
        weight_name: what messages call the weight.
    """
    check_matrix(f"{prefix}hidden", hidden)
    dtypes, name = weight_dtypes(hidden), f"{prefix}{weight_name}"
    if isinstance(weight, torch.nn.Module):
        kind, adapted = type(weight).__name__, hasattr(weight, "lora_A")
        instead = "LoraHead of its base_layer.weight, lora_A, lora_B and scaling" if adapted else "its weight"
        raise TypeError(f"{name} must be a tensor; got a module, {kind}: pass {instead}, and its bias as bias")
    if isinstance(weight, Tensor):
        check_kind(name, weight, hidden)
        if not weight.numel():
            raise ValueError(
                f"{name} must have shape (V, {hidden.shape[-1]}) with V >= 1; got {describe(weight)}: gather a "
                "parameter that is partitioned (ZeRO-3) before the call"
            )
        if weight.ndim == 2 and weight.shape[1] != hidden.shape[-1]:
            turned = ": pass its transpose" if weight.shape[0] == hidden.shape[-1] else ""
            raise ValueError(f"{name} must have shape (V, {hidden.shape[-1]}); got {describe(weight)}{turned}")
    shapes = ((weight.shape[0] if isinstance(weight, Tensor) and weight.ndim else 0, hidden.shape[-1]),)
    check_tensor(name, weight, shapes, dtypes, hidden)
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, ((weight.shape[0],),), dtypes, hidden)
    if leading is not None and tuple(hidden.shape[:-1]) != leading:
        raise ValueError(f"{prefix}hidden must have leading shape {leading}; got {describe(hidden)}")


def weight_dtypes(hidden: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that the weights of a head may have: that of its hidden states, or fp32 with half ones."""
    return (hidden.dtype,) if hidden.dtype == torch.float64 else (hidden.dtype, torch.float32)


def check_chunk(chunk_tokens: int | None, chunk_bytes: int | None) -> None:
    """Check that one of the two, or neither, is given, as an int >= 1."""
    for name, value in (("chunk_tokens", chunk_tokens), ("chunk_bytes", chunk_bytes)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer))):
            raise TypeError(f"{name} must be an int >= 1 or None; got {describe(value)}")
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an int >= 1 or None; got {value}")
    if chunk_tokens is not None and chunk_bytes is not None:
        raise ValueError(f"give chunk_tokens or chunk_bytes, not both; got {chunk_tokens} and {chunk_bytes}")
