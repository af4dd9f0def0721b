"""The interface of a backend: a loss as the caller gave it, and the functions that compute it.

The leading dimensions of the logits are flattened to N rows. A row is dead when its token is masked or ignored, or lies
outside the bounds of `cu_seqlens`: its logits and values are never read, and its outputs and its gradient are 0.
A row whose temperature is not positive and finite, and is not refused, has NaN as its outputs and its gradient.
`backends.eager` defines what each function computes; `backends.cpu` and `backends.triton` compute the same in C++ and
Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..tensor_kinds import written
from .codes import NO_AGGREGATION, ROWS, SCALARS


@dataclass(frozen=True, eq=False)
class RowArguments:
    """The tensors of a loss by row or sequence, as the caller gave them, with any strides.

    "Leading shape" is that of the logits without V: (T,) of packed rows or (B, L). "Either" is the leading shape, or
    (B,) with one value per sequence; for T = B it is the leading shape. Floating-point tensors are fp32 (fp64 for fp64
    logits). None: absent.

    Args:
        token_ids: leading shape, int64; IGNORED marks a dead row.
        response_mask: leading shape, bool; False marks a dead row.
        cu_seqlens: (B + 1,) int32, contiguous: bounds of packed sequences. Without it each packed row is a sequence.
        reward_advantages, cost_advantages, cost_baselines: either.
        costs, cost_limits: either. Without costs every row is safe. cost_limits replaces the scalar cost_limit.
        old_logps, ref_logps, importance_weights: leading shape.
        temperatures: either; replaces the scalar temperature.
    """

    token_ids: Tensor
    response_mask: Tensor | None
    cu_seqlens: Tensor | None
    reward_advantages: Tensor
    cost_advantages: Tensor | None
    costs: Tensor | None
    cost_limits: Tensor | None
    cost_baselines: Tensor | None
    old_logps: Tensor | None
    ref_logps: Tensor | None
    importance_weights: Tensor | None
    temperatures: Tensor | None

    @property
    def tensors(self) -> list[Tensor | None]:
        """All fields in their order."""
        return [getattr(self, name) for name in ARGUMENTS]

    @staticmethod
    def of(tensors: Sequence[Tensor | None]) -> RowArguments:
        """Name a list like `tensors`, as an operator gets it.

        PyTorch writes out a lazy negation for an operator, but not within a list with None in it.
        """
        return RowArguments(*(value if value is None else written(value) for value in tensors))  # type: ignore[arg-type]  # the first and the fourth are never None

    @property
    def leading(self) -> tuple[int, ...]:
        """(T,) or (B, L)."""
        return tuple(self.token_ids.shape)

    @property
    def sequences(self) -> int:
        """The number of sequences, S."""
        return self.token_ids.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


ARGUMENTS = tuple(field.name for field in fields(RowArguments))
# What the caller calls an argument, where that is another name.
NAMES = {"cost_limits": "cost_limit", "temperatures": "temperature"}

# The floats or 0-d tensors of SCALARS, or all of them as one tensor (11,) of the compute dtype on the logits' device.
Scalars = tuple[float | Tensor, ...] | Tensor


@dataclass(frozen=True, eq=False)
class Loss:
    """A loss without its logits.

    Args:
        arguments: its tensors.
        scalars: its numbers.
        code: a packed `Code`.
        softcap: 0.0 for none.
        entropy: ENTROPY_NONE, ENTROPY_VALUE or ENTROPY_GRADIENT.
    """

    arguments: RowArguments
    scalars: Scalars
    code: int
    softcap: float
    entropy: int

    @property
    def named_tensors(self) -> dict[str, Tensor | None]:
        """Its tensors, those among the scalars too, by the names of the caller's arguments."""
        named = {NAMES.get(name, name): getattr(self.arguments, name) for name in ARGUMENTS}
        if not isinstance(self.scalars, Tensor):
            named |= {name: x for name, x in zip(SCALARS, self.scalars, strict=True) if isinstance(x, Tensor)}
        return named

    @property
    def unscaled(self) -> Loss:
        """The same loss with grad_scale = 1."""
        assert not isinstance(self.scalars, Tensor)
        at = SCALARS.index("grad_scale")
        return replace(self, scalars=(*self.scalars[:at], 1.0, *self.scalars[at + 1 :]))

    @property
    def per_token(self) -> bool:
        """Whether the losses of the rows are the result, and not their sum."""
        return self.code >> 8 & 7 == NO_AGGREGATION


@dataclass(frozen=True, eq=False)
class RowResults:
    """What a loss computes for each row.

    Args:
        rows: (5, N) by ROWS, compute dtype.
        flags: (N,) int32, bits LIVE, UNSAFE, CLIPPED_LOW and CLIPPED_HIGH.
    """

    rows: Tensor
    flags: Tensor

    @staticmethod
    def allocate(like: Tensor, count: int, zeros: bool = False) -> RowResults:
        """Allocate results of `count` rows on the device of `like`; zeros: fill them with 0, as on dead rows."""
        create: Any = torch.zeros if zeros else torch.empty
        rows = create((len(ROWS), count), dtype=compute_dtype(like), device=like.device)
        return RowResults(rows, create(count, dtype=torch.int32, device=like.device))


@dataclass(frozen=True, eq=False)
class RowRange:
    """Which rows of a loss the rows of some logits are: those at `index`, or consecutive ones from `first` on.

    Args:
        first: the first row; 0 with an index.
        index: (n,) int64, the live rows, or None.
    """

    first: int = 0
    index: Tensor | None = None


ALL_ROWS = RowRange()


class Backend(Protocol):
    """A backend: a module with these functions, which `choice.load` returns.

    logits, ref_logits: (T, V) or (B, L, V) with any row strides and unit column stride; ids: (N,) with N = T or B * L.
    """

    def new_gradient(self, logits: Tensor, arguments: RowArguments | None) -> tuple[Tensor, bool]:
        """Allocate dL/dlogits, shaped like the logits.

        Args:
            logits: see the class.
            arguments: whose ids and mask say which rows are dead; None: not known.

        Returns:
            The tensor, and whether it is filled with zeros, which the caller passes on as `zeroed`.
        """

    def prepare(self, logits: Tensor, loss: Loss) -> Any:
        """Compute what all rows of the loss share, such as the number of live tokens. Other functions take it.

        logits: give the compute dtype and the device, nothing else.
        """

    def fused(
        self,
        logits: Tensor,
        ref_logits: Tensor | None,
        loss: Loss,
        prepared: Any,
        results: RowResults,
        grad: Tensor | None,
        where: RowRange = ALL_ROWS,
        upstream: Tensor | None = None,
        zeroed: bool = False,
    ) -> None:
        """Write the weighted loss of each row into `results` and, if `grad` is given, its gradient.

        Args:
            logits: those of the rows `where`.
            ref_logits: like logits, for KL_FULL.
            loss: all rows.
            prepared: what `prepare` returned.
            results: of all N rows.
            grad: receives dL/dlogits times grad_scale; may be `logits` itself. Its dtype is that of the logits or, for
                fp32 logits, bf16 or fp16. None: only the forward runs.
            where: which rows.
            upstream: (N,), multiplies the gradient of each row; None for 1.
            zeroed: `grad` is filled with zeros, so that dead rows need not be written.

        Raises:
            IndexError: a live id is outside [0, V) (cpu and eager; Triton gives NaN in that row).
            ValueError: a live row's own temperature is not positive and finite (likewise).
        """

    def reduce(self, loss: Loss, prepared: Any, results: RowResults) -> tuple[Tensor, Tensor]:
        """Sum the rows in a fixed order.

        Returns:
            The loss, 0-d, and the statistics (18,) by STATS.
        """

    def whole(
        self, logits: Tensor, ref_logits: Tensor | None, loss: Loss, grad: Tensor | None, zeroed: bool = False
    ) -> tuple[Tensor, Tensor, RowResults]:
        """Run `prepare`, `fused` on all rows and `reduce`. Returns the loss, the statistics and the results."""

    def statistics(self, logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int) -> Tensor:
        """Compute the state (7, N) by STATE: log-probability of the id, entropy, and what `apply` needs.

        Args:
            logits: see the class.
            ids: (N,) int64, IGNORED on dead rows.
            temperature: 0-d or (N,), compute dtype, on the logits' device.
            softcap: 0.0 for none.
            entropy: ENTROPY_NONE or ENTROPY_VALUE.
        """

    def apply(
        self,
        logits: Tensor,
        ids: Tensor,
        state: Tensor,
        slopes: Tensor,
        temperature: Tensor,
        softcap: float,
        grad: Tensor,
    ) -> None:
        """Write dL/dlogits into `grad`, which may be `logits`, from the state (7, N) and the slopes (3, N)."""

    def scale_rows(self, grad: Tensor, upstream: Tensor, flags: Tensor | None) -> None:
        """Multiply the rows of `grad` by `upstream`, 0-d or (N,), in place, with one rounding.

        flags: (N,) int32; rows whose flags are 0 are dead and stay 0 whatever the factor. None: all are live.
        """


def compute_dtype(value: Tensor) -> torch.dtype:
    """Return the dtype in which a loss of these logits is computed: fp64 for fp64, else fp32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def device_scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a 0-d tensor of dtype on the device.

    A kernel fills in a float, since copying one from the host would wait for the device. torch.compile would make a
    constant of that float and compile anew for each value; a factor may vary.
    """
    if isinstance(value, Tensor):
        value = value.detach() if value.requires_grad else value
        if value.dtype == dtype and value.device == device:  # a call of `to` would cost as much as an operator
            return value
        return value.to(device, dtype, non_blocking=True)
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=dtype, device=device) * value
    return torch.full((), value, dtype=dtype, device=device)


def at_rows(temperature: Tensor, index: Tensor | slice) -> Tensor:
    """Return the temperatures of some rows, (n,) of (N,); one of all rows, 0-d, stays as it is."""
    return temperature[index] if temperature.ndim else temperature


def scalar_vector(scalars: Scalars, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the scalars as one tensor (11,) on the device, without waiting for it."""
    if isinstance(scalars, Tensor):
        return scalars
    tensors = any(isinstance(value, Tensor) for value in scalars)
    if device.type == "cpu" and not tensors and not torch.compiler.is_compiling():
        return torch.tensor(scalars, dtype=dtype)
    return torch.stack([device_scalar(value, dtype, device) for value in scalars])
