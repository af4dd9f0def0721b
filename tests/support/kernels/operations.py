"""What a call dispatches, as a dispatch mode and as PyTorch's profiler see it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Records each operation with its arguments, and the shape of every tensor that it returns in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []
        self.shapes: list[tuple[int, ...]] = []

    @property
    def seen(self) -> list[str]:
        """The names."""
        return [str(operation) for operation, _ in self.calls]

    def arguments_of(self, operation: Any) -> tuple:
        """The arguments of an operation that was called once."""
        (arguments,) = (arguments for called, arguments in self.calls if called is operation)
        return arguments

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None:
            self.shapes.append(tuple(result.shape))
        return result


def profiled_operations(call: Callable[[], object]) -> list[str]:
    """Names of the operators of PyTorch and of ours that a call dispatches, without those that they call themselves.

    Backward counts too. The direct path of the losses is not seen by a dispatch mode: within one they take another way.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()

    def is_operator(event: Any) -> bool:
        return event.name.startswith(("aten::", "repo_kernels::"))

    def is_inner(event: Any) -> bool:
        parent = event.cpu_parent
        return parent is not None and (is_operator(parent) or is_inner(parent))

    return [event.name for event in profile.events() if is_operator(event) and not is_inner(event)]
