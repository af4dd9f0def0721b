"""Kinds of tensors: which have memory that a kernel may read, which only shapes, and which none of the functions take.

Kernels read the memory of plain tensors. Others go through PyTorch's dispatcher, or are refused by name.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain(*values: Tensor | None) -> bool:
    """Return whether each tensor is one with memory that may be read as it stands, or None.

    One whose operators Python dispatches and one that is negated lazily are not; those go through PyTorch's dispatcher.
    """
    return all(
        value is None or ((type(value) in PLAIN_TYPES or not _is_dispatched(value)) and not value.is_neg())
        for value in values
    )


def _is_dispatched(value: Tensor) -> bool:
    """Return whether a subclass has a __torch_dispatch__; one with a __torch_function__ alone has memory of its own."""
    return torch._C._dispatch_keys(value).has(torch._C.DispatchKey.Python)


def is_traced() -> bool:
    """Return whether something looks at every operator: torch.compile, a dispatch mode or a transform of functorch."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_transformed() -> bool:
    """Return whether a transform of torch.func or a forward-mode derivative surrounds the call."""
    return forward_ad._current_level >= 0 or _in_functorch()


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# torch.compile asks it while tracing, and guards the state of functorch itself.
_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]


def written(value: Tensor) -> Tensor:
    """Return the tensor with its values in memory: kernels do not see a lazy negation, nor a lazy zero."""
    if value.is_neg():
        return value.resolve_neg()
    return value.clone() if value._is_zerotensor() else value  # type: ignore[operator]


def kept(value: Tensor | None) -> Tensor | None:
    """Return the tensor so that autograd can save it: a copy of one that was made in inference mode."""
    return value.clone() if value is not None and value.is_inference() else value


def check_kind(name: str, value: Tensor, like: Tensor | None = None) -> None:
    """Raise TypeError for a tensor that has no rows and columns in memory, or is fake where `like` is not.

    Args:
        name: of the argument.
        value: the tensor.
        like: the logits or hidden states, or None if those are the value.
    """
    plain = type(value) in PLAIN_TYPES and value.layout is torch.strided and not value.is_nested
    unseen = torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack()
    if plain and unseen and (like is None or type(like) in PLAIN_TYPES):
        return
    if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be a tensor with data; got an {type(value).__name__}, which no call has filled")
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor; got a nested one: pass its values() as packed rows, with cu_seqlens"
        )
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor; got one of layout {layout}: pass {name}.to_dense()")
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(value, distributed.DTensor):
        raise TypeError(f"{name} must be a tensor of this process; got a DTensor: pass its to_local() or full_tensor()")
    masked = sys.modules.get("torch.masked.maskedtensor.core")
    if masked is not None and masked.is_masked_tensor(value):
        raise TypeError(f"{name} must be a plain tensor; got a MaskedTensor: pass its values, and response_mask")
    if not torch.compiler.is_compiling():
        _check_fake(name, value, like)


def _check_fake(name: str, value: Tensor, like: Tensor | None) -> None:
    """Raise TypeError if one of the two is fake, or a mode makes fakes, and the value is not, or the reverse."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    if fakes is None:
        return
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) or getattr(like, "fake_mode", None)
    if isinstance(value, fakes.FakeTensor):
        if like is not None and type(like) in PLAIN_TYPES:
            raise TypeError(f"{name} must be a real tensor, as the logits or hidden states are; got a FakeTensor")
        return
    if mode is not None and type(value) in PLAIN_TYPES and not mode.allow_non_fake_inputs:
        raise TypeError(f"{name} must be a FakeTensor like the others or in FakeTensorMode; got a real tensor")


def has_values(value: Tensor) -> bool:
    """Return whether a tensor has values: one on the meta device and a FakeTensor have shapes alone."""
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    return not value.is_meta and (fakes is None or not isinstance(value, fakes.FakeTensor))


def makers_like(source: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which new tensors are fake if `source` is."""
    mode = None if torch.compiler.is_compiling() or type(source) in PLAIN_TYPES else getattr(source, "fake_mode", None)
    return contextlib.nullcontext() if mode is None else mode


def check_memory(**values: Tensor | None) -> None:
    """Raise ValueError for a plain tensor whose storage was freed, as FSDP's is outside of its forward, or shrunk.

    values: by the names of arguments.
    """
    if is_traced():
        return
    for name, value in values.items():
        if value is not None and is_plain(value) and has_values(value) and value.numel() and not _has_memory(value):
            raise ValueError(
                f"{name} must be a tensor with memory; got one of shape {tuple(value.shape)} whose storage was freed "
                "or shrunk"
            )


def _has_memory(value: Tensor) -> bool:
    """Return whether the storage of a tensor with elements reaches to its last element."""
    elements, strides = value.untyped_storage().nbytes() // value.itemsize - value.storage_offset(), value.stride()
    last = sum(map(mul, value.shape, strides)) - sum(strides)  # the sum of (size - 1) stride
    return elements > last and value.data_ptr() != 0


def operate(operator: Callable[..., Any], named: Mapping[str, Tensor | None], *arguments: Any) -> Any:
    """Call an operator of torch.library.

    Args:
        operator: the operator.
        named: the tensors among its arguments, by the names that the caller knows.
        arguments: of the operator.

    Raises:
        TypeError: a tensor is of a subclass that does not take the operator.
    """
    if torch.compiler.is_compiling():
        return operator(*arguments)
    try:
        return operator(*arguments)
    except (NotImplementedError, TypeError) as error:
        others = [f"{name} ({type(x).__name__})" for name, x in named.items() if x is not None and not is_plain(x)]
        if not others:
            raise
        raise TypeError(f"{', '.join(others)} must be a plain tensor: its type does not take the operator") from error
