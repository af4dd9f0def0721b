"""Live bytes: count the bytes of the tensors that exist while a piece of code runs, on any device, "meta" included."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
BINARY = {aten.add, aten.sub, aten.mul, aten.div}  # operators whose operands are brought to one dtype


class LiveBytes(TorchDispatchMode):
    """A context that counts the tensors which PyTorch's operators return inside it, until they are freed.

    A storage counts once, however many views it has; tensors that existed before do not count. What an operator
    allocates and frees inside itself is not seen, see `inside`.

    now: bytes that live now. peak: most bytes that lived at once. calls: operators so far.
    limit: number of operators after which RuntimeError is raised, None for no limit.
    promotes: count the copies that PyTorch's CPU kernels make of operands of another dtype than the result's.
    kernels: functions to call instead of operators, by the operator's name.
    """

    def __init__(
        self,
        limit: int | None = None,
        promotes: bool = False,
        kernels: Mapping[str, Callable[..., Tensor]] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.now = self.peak = self.calls = 0
        self.limit, self.promotes = limit, promotes
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count the storages that it makes."""
        self.calls += 1
        if self.limit is not None and self.calls > self.limit:
            raise RuntimeError(f"one layer runs more than {self.limit} operators")
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._add(tensor, counts=False)
        result = self.kernels.get(func.name().partition(".")[0], func)(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor, counts=True)
        if self.promotes and func.overloadpacket in BINARY:
            operands = [t for t in args if isinstance(t, Tensor) and t.ndim and t.dtype != result.dtype]
            self.inside(sum(t.numel() for t in operands) * result.element_size())
        return result

    def inside(self, size: int) -> None:
        """Count bytes that exist now, in the middle of an operator, and are freed at its end."""
        self.peak = max(self.peak, self.now + size)

    def _add(self, tensor: Tensor, counts: bool) -> None:
        """Note a tensor's storage, unless it is known. counts: it is new and its bytes count until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counts else 0

        def freed(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def size_of(*tensors: Tensor | None) -> int:
    """Add up the bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
