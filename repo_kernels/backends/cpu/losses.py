"""The loss kernels of the C++ backend: `backends.interface.Backend` over the functions of `csrc/losses/`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interface import ENTROPY_NONE, IGNORED, KL_FULL, STATE, TOKENS, Code, LossRows
from . import memory
from .extension import _cpu


def new_gradient(logits: Tensor, ids: Tensor) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits for rows with these ids; the flag says whether it is filled with zeros."""
    return memory.new_gradient(logits, int((ids == IGNORED).sum()))


def fused(
    logits: Tensor, ref_logits: Tensor | None, rows: LossRows, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute losses (N,) and TOKENS (13, N), and write dL/dlogits times grad_scale into `grad` if it is given.

    Raises:
        IndexError: the id of a live row is outside [0, V). Nothing has been written then.
    """
    count = rows.ids.numel()
    losses, tokens = rows.values.new_empty(count), rows.values.new_empty(len(TOKENS), count)
    if Code.unpack(rows.code).kl != KL_FULL:
        ref_logits = None
    _cpu.fused(
        logits.detach(),
        None if ref_logits is None else ref_logits.detach(),
        None if grad is None else grad.detach(),
        zeroed,
        rows.ids.contiguous(),
        rows.values.contiguous(),
        rows.scalars,
        rows.code,
        rows.softcap,
        rows.entropy != ENTROPY_NONE,
        losses,
        tokens,
        torch.get_num_threads(),
    )
    return losses, tokens


def statistics(
    logits: Tensor, ref_logits: Tensor | None, ids: Tensor, scalars: Tensor, softcap: float, entropy: int
) -> Tensor:
    """Compute the STATE (7, N) of the rows."""
    state = scalars.new_empty(len(STATE), ids.numel())
    _cpu.statistics(
        logits.detach(),
        None if ref_logits is None else ref_logits.detach(),
        ids.contiguous(),
        scalars,
        softcap,
        entropy != ENTROPY_NONE,
        state,
        torch.get_num_threads(),
    )
    return state


def apply(
    logits: Tensor,
    ref_logits: Tensor | None,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    scalars: Tensor,
    softcap: float,
    grad: Tensor,
    zeroed: bool = False,
) -> None:
    """Write dL/dlogits into `grad` from the STATE (7, N) of the rows and their SLOPES (3, N)."""
    _cpu.apply(
        logits.detach(),
        None if ref_logits is None else ref_logits.detach(),
        grad.detach(),
        zeroed,
        ids.contiguous(),
        state.detach().contiguous(),
        slopes.contiguous(),
        scalars,
        softcap,
        torch.get_num_threads(),
    )


def scale_rows(grad: Tensor, upstream: Tensor) -> None:
    """Multiply each row of `grad` by its entry of `upstream` (N,), in place; a row whose factor is 1 is not touched."""
    _cpu.scale_rows(grad.detach(), upstream.detach(), torch.get_num_threads())
