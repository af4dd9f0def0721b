"""One softmax out of the parts of a vocabulary that processes hold: what a backend computes of a part, and their sums.

The kernels are those of a whole vocabulary: a backend's `statistics` describes the softmax over a part, and its `apply`
writes the gradient once the normaliser of the part is replaced by the common one. Both take a target in every row.
Where another process holds it, the first column stands in: its log-probability is not used, and its gradient, which
came out as that of a target, is written anew.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends import choice
from ...backends.codes import ENTROPY_NONE, IGNORED, STATE
from ...backends.eager.distributions import LOG2_E, Distributions, apply_rows, distributions, finite_log
from ...backends.eager.kernels import chunks, put_rows, take_rows, zero_dead_rows
from ...backends.interface import at_rows
from .shard import VocabularyShard

LOGP, ENTROPY, MAX2, LOG2_SUM = (STATE.index(name) for name in ("logp", "entropy", "max2", "log2_sum"))
LN_2 = math.log(2.0)
# A part whose largest logit times log2(e) / temperature is below it adds nothing to a softmax that has digits left.
LOWEST = -(2.0**30)


def part_statistics(
    logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int, backend: str
) -> Tensor:
    """Compute the STATE (7, N) of the softmax over this part; a row of -inf alone has max2 0 and log2_sum -inf.

    Args:
        logits: (N, V_r) or (B, L, V_r).
        ids: (N,), within the part; V_r where another process holds the target, IGNORED on dead rows.
        temperature, softcap, entropy: as the backend's `statistics` takes them. backend: its name.
    """
    state = choice.load(backend).statistics(logits, _with_stand_in(ids, logits), temperature, softcap, entropy)
    failed = state[LOG2_SUM].isnan() & (ids != IGNORED)
    # a mask can leave a part of -inf alone, but no softcap does; a GPU looks at all rows, since that does not wait
    if softcap or (failed.device.type == "cpu" and not failed.any()):
        return state
    largest = logits.amax(-1).reshape(-1).to(state.dtype)
    empty = failed & (largest * (LOG2_E / temperature) < LOWEST)
    values = {LOGP: -math.inf, ENTROPY: 0.0, MAX2: 0.0, LOG2_SUM: -math.inf}
    for row, value in values.items():
        state[row] = torch.where(empty, value, state[row])
    return state


def one_softmax(local: Tensor, owned: Tensor, entropy: int, shard: VocabularyShard) -> Tensor:
    """Make the STATE (7, N) of the whole vocabulary out of that of each process.

    Its max2 stays the local one, and log2_sum becomes what makes the local p_v those of the whole softmax.

    Args:
        local: (7, N), of the softmax over this process's part, 0 on dead rows.
        owned: (N,), rows whose target is in it.
        entropy: ENTROPY_NONE or ENTROPY_VALUE.
        shard: the part.
    """
    normaliser = local[MAX2] + local[LOG2_SUM]  # log2 of the sum of exponentials, of this part
    top = shard.maximum(normaliser)
    above = (normaliser - top) * LN_2
    share = above.exp()
    target = torch.where(owned, local[LOGP] + above, 0.0)
    parts = [share, target]
    if entropy != ENTROPY_NONE:
        parts.append(share * torch.where(share > 0, above - local[ENTROPY], 0.0))  # sum of e^(z - top) (z - top)
    sums = shard.add_up(torch.stack(parts))
    log_sum = sums[0].log()
    state = local.clone()
    state[LOGP] = sums[1] - log_sum
    if entropy != ENTROPY_NONE:
        state[ENTROPY] = log_sum - sums[2] / sums[0]
    state[LOG2_SUM] = top + log_sum / LN_2 - local[MAX2]
    return state


def part_gradient(
    logits: Tensor,
    ids: Tensor,
    state: Tensor,
    slopes: Tensor,
    temperature: Tensor,
    softcap: float,
    grad: Tensor,
    *,
    backend: str,
) -> None:
    """Write dL/dlogits of this part into `grad`, which may be `logits`.

    Args:
        logits, ids: as in `part_statistics`. state: (7, N), of the whole vocabulary.
        slopes, temperature, softcap: as the backend's `apply` takes them. grad: like logits. backend: its name.
    """
    elsewhere = ids == logits.shape[-1]
    first = _first_column(logits, state, slopes, temperature, softcap)
    # the eager one computes the normaliser anew
    apply = _apply_given_normaliser if backend == "eager" else choice.load(backend).apply
    apply(logits, _with_stand_in(ids, logits), state, slopes, temperature, softcap, grad)
    column = grad[..., 0]
    column.copy_(torch.where(elsewhere.view(column.shape), first.view(column.shape).to(grad.dtype), column))


def _with_stand_in(ids: Tensor, logits: Tensor) -> Tensor:
    return torch.where(ids == logits.shape[-1], 0, ids)


def _first_column(logits: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float) -> Tensor:
    """Compute dL/dz of the first column, (N,), where it is not the target.

    That is -p (g_logp + g_H (log p + H)) / temperature times the slope of the softcap.
    """
    z = logits[..., 0].reshape(-1).to(state.dtype)
    g_logp, g_entropy, _ = slopes
    slope: Tensor | float = 1.0
    if softcap:
        decay = torch.exp(-2 * (z / softcap).abs())
        z, slope = softcap * torch.tanh(z / softcap), 4 * decay / (1 + decay) ** 2
    # in fp64, since max2 is as large as the logits are
    scaled = z.double() * (LOG2_E / temperature) - state[MAX2]
    log_p = ((scaled - state[LOG2_SUM]) * LN_2).to(z.dtype)
    return -log_p.exp() * (g_logp + g_entropy * (finite_log(log_p) + state[ENTROPY])) / temperature * slope


def _apply_given_normaliser(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, grad: Tensor
) -> None:
    """Write dL/dlogits as the eager backend's `apply` does, but with the normaliser of the state."""
    live = (ids != IGNORED).nonzero().squeeze(1)
    for start, stop in chunks(live.numel(), logits.shape[-1]):
        index = live[start:stop]
        given, by = state[:, index], at_rows(temperature, index)
        rows = distributions(take_rows(logits, index, state.dtype), by, softcap or None)
        shift = ((rows.max2 - given[MAX2]) + (rows.log2_sum - given[LOG2_SUM])) * LN_2
        empty = rows.max2.isneginf()  # its own normaliser is NaN
        log_probs = torch.where(empty[:, None], -math.inf, rows.log_probs + shift[:, None])
        rows = Distributions(log_probs, rows.slope, rows.max2, rows.log2_sum)
        part = apply_rows(rows, ids[index], by, softcap or None, slopes[:, index], given[ENTROPY], None, None)
        put_rows(grad, index, part)
    zero_dead_rows(grad, ids)
