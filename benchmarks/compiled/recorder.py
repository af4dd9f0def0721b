"""Records what Triton kernels load from and store to tensors in the interpreter: bytes, launches, order, hints.

    with Recorder(logits=x) as recorder:     # TRITON_INTERPRET=1 must have been set before the kernels were defined
        ...launch...
    recorder.bytes("logits", store=False)
    recorder.launches[0].programs            # {(x, y, z): [Access, ...]}

Masked lanes do not count. Tensors that were not named but are as large as the smallest named one (gradients that a
function allocates) are recorded under the name of the kernel's parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor

from .l2_model import PRIORITY, Access


@dataclass
class Launch:
    """One launch: name of its kernel, and the accesses of each program in their order."""

    kernel: str
    programs: dict[tuple[int, int, int], list[Access]] = field(default_factory=dict)


class Recorder:
    """Hooks into the interpreter while it is entered. Offsets of accesses are from the start of the tensor."""

    def __init__(self, **tensors: Tensor) -> None:
        self.launches: list[Launch] = []
        # Name -> (first byte, byte after the last). The tensors are kept, so that no address is used twice.
        self._ranges: dict[str, tuple[int, int]] = {}
        self._tensors: list[Tensor] = []
        for name, tensor in tensors.items():
            self._watch(name, tensor)
        self._least = min(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        self._saved: dict[tuple[type, str], Any] = {}

    def _watch(self, name: str, tensor: Tensor) -> None:
        start = tensor.untyped_storage().data_ptr()
        if all(start != low for low, _ in self._ranges.values()):
            while name in self._ranges:
                name += "_"
            self._ranges[name] = start, start + tensor.untyped_storage().nbytes()
            self._tensors.append(tensor)

    def bytes(self, tensor: str, store: bool) -> int:
        """Bytes loaded from or stored to a tensor in all launches."""
        return sum(a.size for a in self.accesses() if a.tensor == tensor and a.store == store)

    def total_bytes(self) -> int:
        """Bytes moved between the kernels and all recorded tensors."""
        return sum(a.size for a in self.accesses())

    def accesses(self) -> Iterator[Access]:
        """All accesses of all programs."""
        for launch in self.launches:
            for program in launch.programs.values():
                yield from program

    def row_programs(self, row: int, row_bytes: int, at_least: int = 32) -> list[list[list[Access]]]:
        """Of each launch, the accesses of each program to one row, with offsets from the row's start.

        Accesses under `at_least` bytes, such as to the target's column, are left out: they move a sector, and a model
        in segments would charge them a whole one.
        """
        low, high = row * row_bytes, (row + 1) * row_bytes
        launches = []
        for launch in self.launches:
            programs = [
                [a._replace(start=a.start - low) for a in program if low <= a.start < high and a.size >= at_least]
                for program in launch.programs.values()
            ]
            launches.append([program for program in programs if program])
        return [launch for launch in launches if launch]

    def _record(self, builder: Any, pointers: Any, mask: Any, store: bool, rest: tuple) -> None:
        from triton.runtime import interpreter

        # A program's slot is made even if it touches nothing recorded, so that the launch order is kept.
        accesses = self.launches[-1].programs.setdefault(tuple(builder.grid_idx), [])
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        live = pointers.data[mask.data.astype(bool)].ravel().astype(np.int64)
        for name, (low, high) in self._ranges.items():
            inside = np.unique(live[(live >= low) & (live < high)])
            if inside.size:
                runs = np.split(inside, np.flatnonzero(np.diff(inside) != size) + 1)
                accesses += [
                    Access(name, store, int(run[0]) - low, run.size * size, _hint(builder, rest)) for run in runs
                ]

    def __enter__(self) -> Recorder:
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        # Unmasked accesses of the interpreter are routed through the masked ones.
        load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def recorded_load(this: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._record(this, pointers, mask, False, rest)
            return load(this, pointers, mask, *rest)

        def recorded_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._record(this, pointers, mask, True, rest)
            return store(this, pointers, value, mask, *rest)

        def recorded_launch(this: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(inspect.signature(this.fn).parameters, args, strict=False)) | kwargs
            for name, argument in arguments.items():
                if isinstance(argument, Tensor) and argument.untyped_storage().nbytes() >= self._least:
                    self._watch(name.lower(), argument)
            self.launches.append(Launch(this.fn.__name__))
            return launch(this, *args, **kwargs)

        self._patch(builder, "create_masked_load", recorded_load)
        self._patch(builder, "create_masked_store", recorded_store)
        self._patch(executor, "__call__", recorded_launch)
        # The interpreter drops cache policies; here they are handed on to the loads and stores, which ignore them.
        if hasattr(builder, "get_cache_policy"):
            self._patch(builder, "get_cache_policy", lambda this, modifier, eviction: eviction)
        return self

    def _patch(self, owner: type, name: str, function: Any) -> None:
        self._saved[owner, name] = owner.__dict__[name]
        setattr(owner, name, function)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for (owner, name), function in self._saved.items():
            setattr(owner, name, function)
        self._saved.clear()


def _hint(builder: Any, rest: tuple) -> str:
    """The eviction hint among the trailing arguments: a string (as patched in), or an enum in earlier versions."""
    for argument in rest:
        name = argument if isinstance(argument, str) else f"evict_{getattr(argument, 'name', '')}".lower()
        name = name.replace("evict_evict", "evict")
        if name in PRIORITY:
            return name
    return "evict_normal"
