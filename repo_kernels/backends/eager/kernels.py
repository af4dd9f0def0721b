"""The functions of the backend in PyTorch, for any dtype including fp64.

The steps are those of the compiled kernels: row statistics, token terms, gradient. Live rows are taken in chunks of
bounded memory; the result of a row does not depend on its neighbours. Ids are checked, which waits for a GPU: this is
the definition, not the fast path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...checks import check_live_ids, check_live_temperatures
from ..codes import ENTROPY_NONE, IGNORED, KL_FULL, KL_NAMES, STATE, Code
from ..interface import ALL_ROWS, Loss, RowArguments, RowRange, RowResults, at_rows
from ..memory_layout import gradient_buffer
from .dense import DenseLoss, prepare
from .distributions import apply_rows, distributions, row_entropy, row_full_kl, target_logps
from .reduction import reduce
from .terms import token_flags, token_inputs, token_rows, token_terms

CHUNK_ELEMENTS = 1 << 23  # 32 MB of fp32 logits


def chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks of at least one row."""
    size = max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def take_rows(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Gather rows of (T, V) or (B, L, V) by flat index into (n, V) of dtype, without copying the whole matrix."""
    if matrix.ndim == 2:
        return matrix[rows].to(dtype)
    length = matrix.shape[1]
    return matrix[rows // length, rows % length].to(dtype)


def put_rows(matrix: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values (n, V) into rows of (T, V) or (B, L, V) by flat index, rounded to the matrix's dtype."""
    if matrix.ndim == 2:
        matrix[rows] = values.to(matrix.dtype)
    else:
        matrix[rows // matrix.shape[1], rows % matrix.shape[1]] = values.to(matrix.dtype)


def zero_dead_rows(grad: Tensor, ids: Tensor) -> None:
    """Fill the gradient rows of dead ids with zeros."""
    dead = (ids == IGNORED).nonzero().squeeze(1)
    put_rows(grad, dead, grad.new_zeros((dead.numel(), grad.shape[-1])))


def new_gradient(logits: Tensor, arguments: RowArguments | None) -> tuple[Tensor, bool]:
    """Allocate dL/dlogits; False: it is not filled with zeros."""
    return gradient_buffer(logits), False


def whole(
    logits: Tensor, ref_logits: Tensor | None, loss: Loss, grad: Tensor | None, zeroed: bool = False
) -> tuple[Tensor, Tensor, RowResults]:
    """Compute the loss, its statistics and its rows, and write dL/dlogits into `grad` if it is given."""
    prepared = prepare(logits, loss)
    results = RowResults.allocate(logits, prepared.ids.numel())
    fused(logits, ref_logits, loss, prepared, results, grad, zeroed=zeroed)
    return *reduce(loss, prepared, results), results


def fused(
    logits: Tensor,
    ref_logits: Tensor | None,
    loss: Loss,
    prepared: DenseLoss,
    results: RowResults,
    grad: Tensor | None,
    where: RowRange = ALL_ROWS,
    upstream: Tensor | None = None,
    zeroed: bool = False,
) -> None:
    """Write ROWS and flags of the rows `where`, and dL/dlogits times grad_scale into `grad` if it is given."""
    dtype, code, coef = results.rows.dtype, Code.unpack(loss.code), prepared.coef
    softcap = loss.softcap or None
    count = logits.shape[:-1].numel()
    rows = where.index
    if rows is None:
        rows = torch.arange(where.first, where.first + count, device=logits.device)
    row_ids = prepared.ids[rows]
    results.rows[:, rows], results.flags[rows] = 0.0, 0
    live = (row_ids != IGNORED).nonzero().squeeze(1)
    check_live_ids(row_ids[live], logits.shape[-1])
    check_live_temperatures(at_rows(prepared.temperature, rows[live]))
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        place = live[start:stop]  # of the logits
        index = rows[place]  # of the loss
        ids, temperature = row_ids[place], at_rows(prepared.temperature, index)
        probs = distributions(take_rows(logits, place, dtype), temperature, softcap)
        reference = kl = entropy = None
        if ref_logits is not None and code.kl == KL_FULL:
            reference = distributions(take_rows(ref_logits, place, dtype), temperature, softcap)
            kl = row_full_kl(probs, reference)
        if loss.entropy != ENTROPY_NONE:
            entropy = row_entropy(probs)
        logps = target_logps(probs, ids)
        inputs = token_inputs({name: value[index] for name, value in prepared.values.items()}, coef, code)
        terms = token_terms(inputs, logps, entropy, kl, coef, KL_NAMES[code.kl], code.kl_importance_weighted)
        results.rows[:, index] = token_rows(terms, logps, entropy)
        results.flags[index] = token_flags(terms, inputs.unsafe)
        if grad is not None:
            slopes = torch.stack((terms.g_logp, terms.g_entropy, terms.g_kl)) * coef.grad_scale
            if upstream is not None:
                slopes = slopes * upstream[index]
            put_rows(grad, place, apply_rows(probs, ids, temperature, softcap, slopes, entropy, kl, reference))
    if grad is not None and not zeroed:
        zero_dead_rows(grad, row_ids)


def statistics(logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int) -> Tensor:
    """Compute the STATE (7, N) of the rows."""
    dtype = temperature.dtype
    state = torch.zeros(len(STATE), ids.numel(), dtype=dtype, device=logits.device)
    live = (ids != IGNORED).nonzero().squeeze(1)
    check_live_ids(ids[live], logits.shape[-1])
    check_live_temperatures(at_rows(temperature, live))
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        index = live[start:stop]
        probs = distributions(take_rows(logits, index, dtype), at_rows(temperature, index), softcap or None)
        state[0, index] = target_logps(probs, ids[index])
        if entropy != ENTROPY_NONE:
            state[1, index] = row_entropy(probs)
        state[3:5, index] = torch.stack((probs.max2, probs.log2_sum))
    return state


def apply(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, grad: Tensor
) -> None:
    """Write dL/dlogits into `grad` from the STATE (7, N) of the rows and their SLOPES (3, N)."""
    dtype, live = temperature.dtype, (ids != IGNORED).nonzero().squeeze(1)
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        index = live[start:stop]
        by = at_rows(temperature, index)
        probs = distributions(take_rows(logits, index, dtype), by, softcap or None)
        rows = apply_rows(probs, ids[index], by, softcap or None, slopes[:, index], state[1, index], None, None)
        put_rows(grad, index, rows)
    zero_dead_rows(grad, ids)


def scale_rows(grad: Tensor, upstream: Tensor, flags: Tensor | None) -> None:
    """Multiply the rows of `grad` by `upstream`, 0-d or (N,), in place; rows whose flags are 0 stay as they are."""
    factor = upstream if flags is None else torch.where(flags != 0, upstream, 1.0)
    factor = factor.expand(grad.shape[:-1].numel()).reshape(grad.shape[:-1])[..., None]
    if grad.dtype == factor.dtype:
        grad *= factor
    else:
        grad.copy_((grad.to(factor.dtype) * factor).to(grad.dtype))
