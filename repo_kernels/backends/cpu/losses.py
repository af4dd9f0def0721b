"""The loss kernels of the C++ backend: `backends.interface.Backend` over the functions of `csrc/losses/`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..codes import ENTROPY_NONE, KL_FULL, STATE, STATS
from ..interface import ALL_ROWS, Loss, RowArguments, RowRange, RowResults
from . import memory
from .extension import _cpu


def new_gradient(logits: Tensor, arguments: RowArguments | None) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits; the flag says whether it is filled with zeros."""
    return memory.new_gradient(logits, arguments)


def prepare(logits: Tensor, loss: Loss) -> None:
    """Do nothing: each call counts live tokens by itself, which is little beside a row of logits."""


def fused(
    logits: Tensor,
    ref_logits: Tensor | None,
    loss: Loss,
    prepared: None,
    results: RowResults,
    grad: Tensor | None,
    where: RowRange = ALL_ROWS,
    upstream: Tensor | None = None,
    zeroed: bool = False,
) -> None:
    """Write ROWS and flags of the rows `where`, and dL/dlogits times grad_scale into `grad` if it is given.

    Raises:
        IndexError: the id of a live row is outside [0, V). Nothing has been written then.
        ValueError: the temperature of a live row, its own, is not positive and finite. Nothing has been written then.
    """
    _fused(logits, ref_logits, loss, results, grad, where, upstream, zeroed, None, None)


def _fused(
    logits: Tensor,
    ref_logits: Tensor | None,
    loss: Loss,
    results: RowResults,
    grad: Tensor | None,
    where: RowRange,
    upstream: Tensor | None,
    zeroed: bool,
    value: Tensor | None,
    stats: Tensor | None,
) -> None:
    """Run the extension once; with `value` and `stats` it also sums up the rows."""
    _cpu.fused(
        logits,
        ref_logits if loss.code >> 2 & 7 == KL_FULL else None,
        grad,
        zeroed,
        loss.arguments.tensors,
        loss.scalars,
        loss.code,
        loss.softcap,
        loss.entropy != ENTROPY_NONE,
        where.first,
        where.index,
        None if upstream is None else upstream.contiguous(),
        results.rows,
        results.flags,
        value,
        stats,
        torch.get_num_threads(),
    )


def reduce(loss: Loss, prepared: None, results: RowResults) -> tuple[Tensor, Tensor]:
    """Return the loss, 0-d, and the statistics (18,) by STATS."""
    value, stats = torch.empty(()), torch.empty(len(STATS))
    _cpu.reduce(loss.arguments.tensors, loss.scalars, loss.code, results.rows, results.flags, value, stats)
    return value, stats


def whole(
    logits: Tensor, ref_logits: Tensor | None, loss: Loss, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor, RowResults]:
    """Compute the loss, its statistics and its rows, and write dL/dlogits into `grad` if it is given."""
    value, stats = torch.empty((), dtype=torch.float32), torch.empty(len(STATS), dtype=torch.float32)
    results = RowResults.allocate(logits, loss.arguments.token_ids.numel())
    _fused(logits, ref_logits, loss, results, grad, ALL_ROWS, None, zeroed, value, stats)
    return value, stats, results


def statistics(logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int) -> Tensor:
    """Compute the STATE (7, N) of the rows."""
    state = temperature.new_empty(len(STATE), ids.numel())
    threads = torch.get_num_threads()
    _cpu.statistics(logits, ids.contiguous(), temperature, softcap, entropy != ENTROPY_NONE, state, threads)
    return state


def apply(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, grad: Tensor
) -> None:
    """Write dL/dlogits into `grad` from the STATE (7, N) of the rows and their SLOPES (3, N)."""
    by_row = ids.contiguous(), state.contiguous(), slopes.contiguous()
    _cpu.apply(logits, grad, *by_row, temperature, softcap, torch.get_num_threads())


def scale_rows(grad: Tensor, upstream: Tensor, flags: Tensor | None) -> None:
    """Multiply the rows of `grad` by `upstream`, 0-d or (N,), in place, with one rounding; rows with flags 0 stay 0."""
    _cpu.scale_rows(grad, upstream, flags, torch.get_num_threads())
