"""Count launches, and bytes that the Triton kernels load and store, in Triton's interpreter.

    with Recorder(logits=x) as recorder:     # TRITON_INTERPRET=1 must be set before the kernels are defined
        ...launch...
    recorder.launches, recorder.bytes("logits", store=False)

Masked lanes do not count. A pass is rows x vocabulary x element size bytes. The counts are of what the kernels ask
for; how much of it a cache answers, they do not say.
"""

from __future__ import annotations

import os

# The kernels must be defined under the interpreter to be counted.
os.environ.setdefault("TRITON_INTERPRET", "1")

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from repo_kernels.backends.codes import (
    ABSENT_SCALARS,
    COST_NONE,
    ENTROPY_GRADIENT,
    ENTROPY_NONE,
    ENTROPY_VALUE,
    KL_FULL,
    KL_K3,
    TOKEN_MEAN,
    Code,
)
from repo_kernels.backends.interface import ARGUMENTS, Loss, RowArguments
from repo_kernels.backends.memory_layout import gradient_buffer

VOCABULARIES = (32_000, 49_152, 151_936)
ROWS = 2  # all rows of a launch do the same


class Access(NamedTuple):
    """One run of consecutive bytes that a program loads or stores at once; start: from that of the tensor's memory."""

    tensor: str
    store: bool
    start: int
    size: int


class Recorder:
    """Record launches (names of kernels) and accesses to tensors while the context is entered.

    A tensor that was not named but is at least as large as the smallest named one (a gradient that a function
    allocates) is recorded under the name of the kernel's parameter.
    """

    def __init__(self, **tensors: Tensor) -> None:
        self.launches: list[str] = []
        self.accesses: list[Access] = []
        # Name -> (first byte, byte after the last). The tensors are kept, so that no address is used twice.
        self._ranges: dict[str, tuple[int, int]] = {}
        self._tensors: list[Tensor] = []
        for name, tensor in tensors.items():
            self._watch(name, tensor)
        self._least = min(tensor.untyped_storage().nbytes() for tensor in tensors.values())
        self._patches: list[tuple[type, str, Any]] = []

    def _watch(self, name: str, tensor: Tensor) -> None:
        start = tensor.untyped_storage().data_ptr()
        if all(start != low for low, _ in self._ranges.values()):
            while name in self._ranges:
                name += "_"
            self._ranges[name] = start, start + tensor.untyped_storage().nbytes()
            self._tensors.append(tensor)

    def bytes(self, tensor: str | None = None, store: bool | None = None) -> int:
        """Return the bytes moved: of one tensor or all, loaded, stored or both."""
        return sum(a.size for a in self.accesses if tensor in (None, a.tensor) and store in (None, a.store))

    def _record(self, pointers: Any, mask: Any, store: bool) -> None:
        from triton.runtime import interpreter

        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        live = pointers.data[mask.data.astype(bool)].ravel().astype(np.int64)
        for name, (low, high) in self._ranges.items():
            inside = np.unique(live[(live >= low) & (live < high)])
            if inside.size:
                runs = np.split(inside, np.flatnonzero(np.diff(inside) != size) + 1)
                self.accesses += [Access(name, store, int(run[0]) - low, run.size * size) for run in runs]

    def __enter__(self) -> Recorder:
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        # The interpreter routes unmasked accesses through the masked ones.
        load, store, launch = builder.create_masked_load, builder.create_masked_store, executor.__call__

        def recorded_load(this: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._record(pointers, mask, store=False)
            return load(this, pointers, mask, *rest)

        def recorded_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._record(pointers, mask, store=True)
            return store(this, pointers, value, mask, *rest)

        def recorded_launch(this: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(inspect.signature(this.fn).parameters, args, strict=False)) | kwargs
            for name, argument in arguments.items():
                if isinstance(argument, Tensor) and argument.untyped_storage().nbytes() >= self._least:
                    self._watch(name.lower(), argument)
            self.launches.append(this.fn.__name__)
            return launch(this, *args, **kwargs)

        self._patch(builder, "create_masked_load", recorded_load)
        self._patch(builder, "create_masked_store", recorded_store)
        self._patch(executor, "__call__", recorded_launch)
        return self

    def _patch(self, owner: type, name: str, function: Any) -> None:
        self._patches.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, function)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._patches:
            setattr(*self._patches.pop())


def make_loss(count: int, entropy: int, kl: int = KL_K3) -> Loss:
    """Make a loss with a KL over packed rows."""
    ones = torch.ones(count)
    tensors = {"token_ids": ones.to(torch.int64), "reward_advantages": ones, "old_logps": -ones, "ref_logps": -ones}
    code = Code(COST_NONE, kl, True, False, on_policy=False, aggregation=TOKEN_MEAN, divisor=False)
    scalars = ABSENT_SCALARS | {"beta": 1.0, "eps_low": 0.2, "eps_high": 0.2, "entropy_coef": 1.0}
    arguments = RowArguments(**(dict.fromkeys(ARGUMENTS) | tensors))
    return Loss(arguments, tuple(scalars.values()), code.pack(), 0.0, entropy)


def fused(logits: Tensor, entropy: int = ENTROPY_NONE) -> None:
    """Launch the loss and its gradient."""
    from repo_kernels.backends import triton as gpu

    gpu.whole(logits, None, make_loss(logits.shape[0], entropy), gradient_buffer(logits))


def fused_full_kl(logits: Tensor) -> None:
    """Launch the loss and its gradient with the exact KL to reference logits."""
    from repo_kernels.backends import triton as gpu

    loss = make_loss(logits.shape[0], ENTROPY_NONE, KL_FULL)
    gpu.whole(logits, logits.clone(), loss, gradient_buffer(logits))


def forward(logits: Tensor) -> None:
    """Launch the loss alone."""
    from repo_kernels.backends import triton as gpu

    gpu.whole(logits, None, make_loss(logits.shape[0], ENTROPY_NONE), None)


def statistics(logits: Tensor) -> Tensor:
    """Launch the log-probabilities alone; return their state."""
    from repo_kernels.backends import triton as gpu

    ids = torch.ones(logits.shape[0], dtype=torch.int64)
    return gpu.statistics(logits, ids, torch.ones(()), 0.0, ENTROPY_NONE)


def two_step(logits: Tensor) -> None:
    """Launch the statistics, then the gradient from them."""
    from repo_kernels.backends import triton as gpu

    count = logits.shape[0]
    ids, slopes = torch.ones(count, dtype=torch.int64), torch.ones(3, count)
    gpu.apply(logits, ids, statistics(logits), slopes, torch.ones(()), 0.0, gradient_buffer(logits))


COMPUTATIONS: dict[str, Callable[[Tensor], object]] = {
    "loss and gradient": fused,
    "with the entropy's value": lambda logits: fused(logits, ENTROPY_VALUE),
    "with the entropy's gradient": lambda logits: fused(logits, ENTROPY_GRADIENT),
    "with full KL": fused_full_kl,
    "loss alone": forward,
    "log-probabilities": statistics,
    "log-probabilities, then their gradient": two_step,
}


class Passes(NamedTuple):
    """Passes over the logits that a computation loads and stores, and its launches."""

    loaded: float
    stored: float
    launches: int

    @property
    def issued(self) -> float:
        """Loaded and stored."""
        return self.loaded + self.stored


def count_passes(call: Callable[[Tensor], object], vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> Passes:
    """Run a computation on (ROWS, vocabulary) random logits and count what it moves."""
    logits = torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Recorder(logits=logits) as recorder:
        call(logits)
    whole = ROWS * vocabulary * dtype.itemsize
    loaded, stored = (recorder.bytes(store=store) / whole for store in (False, True))
    return Passes(loaded, stored, len(recorder.launches))


def table() -> str:
    """Return launches and passes of every computation, for every vocabulary, as Markdown."""
    lines = ["| computation | V | launches | passes loaded | passes stored |", "|---" * 5 + "|"]
    for title, call in COMPUTATIONS.items():
        for vocabulary in VOCABULARIES:
            passes = count_passes(call, vocabulary)
            lines.append(f"| {title} | {vocabulary} | {passes.launches} | {passes.loaded:.2f} | {passes.stored:.2f} |")
    return "\n".join(lines)
