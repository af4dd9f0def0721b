"""Log-probabilities and entropy where each process holds a part of the vocabulary.

Every process has all rows of hidden states and forms the logits of its part of the vocabulary. Two all-reduces in the
forward, of a maximum and of sums per row, make them one softmax, and one in the backward sums dL/dhidden. The kernels
are those of a whole vocabulary: a backend's `statistics` describes the local softmax, and `apply` writes the gradient
once the local normaliser is replaced by the common one. A column that no token has, of logit -1e30 and so of
probability 0, stands for targets that other processes hold.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...backends import choice
from ...backends.codes import ENTROPY_NONE, IGNORED, STATE
from ...backends.eager.distributions import Distributions, apply_rows, divisors
from ...backends.interface import at_rows
from ..autograd import refuse_second_order
from ..heads.chunks import Budget
from ..heads.linear import LinearHead, slope_chunks, statistics_chunks
from ..heads.lora import HEAD_NAMES, LEAVES, HeadTensors
from .shard import VocabularyShard

ABSENT = -1e30
LOGP, ENTROPY, MAX2, LOG2_SUM = (STATE.index(name) for name in ("logp", "entropy", "max2", "log2_sum"))
LN_2 = math.log(2.0)


def one_softmax(local: Tensor, owned: Tensor, entropy: int, shard: VocabularyShard) -> Tensor:
    """Make the STATE (7, N) of the whole vocabulary out of that of each process.

    Its max2 stays the local one, and log2_sum becomes what makes the local p_v those of the whole softmax.

    Args:
        local: (7, N), of the softmax over this process's part. owned: (N,), rows whose target is in it.
        entropy: ENTROPY_NONE or ENTROPY_VALUE.
    """
    normaliser = local[MAX2] + local[LOG2_SUM]  # log2 of the sum of exponentials, of this part
    top = shard.maximum(normaliser)
    above = (normaliser - top) * LN_2
    share = above.exp()
    target = torch.where(owned, local[LOGP] + above, 0.0)
    parts = [share, target]
    if entropy != ENTROPY_NONE:
        parts.append(share * torch.where(share > 0, above - local[ENTROPY], 0.0))  # sum of e^(z - top) (z - top)
    sums = shard.total_of(torch.stack(parts))
    log_sum = sums[0].log()
    state = local.clone()
    state[LOGP] = sums[1] - log_sum
    if entropy != ENTROPY_NONE:
        state[ENTROPY] = log_sum - sums[2] / sums[0]
    state[LOG2_SUM] = top + log_sum / LN_2 - local[MAX2]
    return state


class ShardedStatistics(torch.autograd.Function):
    """(log-probabilities, entropy) of the ids, (2, N), from hidden states and this process's part of the head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: Tensor | None,
        ids: Tensor,
        temperature: Tensor,
        entropy: int,
        shard: VocabularyShard,
        budget: Budget,
        backend: str,
    ) -> Tensor:
        """Compute them.

        Args:
            hidden: (T, H) or (B, L, H), the same in every process.
            weight, bias: (V_r, H) and (V_r,) or None, the rows of this process.
            lora_a, lora_b, scaling: (r, H), the same in every process, (V_r, r) and 0-d; or None.
            ids: (N,) int64, of the whole vocabulary, IGNORED on dead rows; the same in every process.
            temperature: 0-d or (N,), compute dtype.
            entropy: ENTROPY_NONE or ENTROPY_VALUE.
            shard, budget, backend: whose rows, the size of a chunk, and what computes one.
        """
        ids, owned = shard.local_ids(ids)
        with torch.autocast(hidden.device.type, enabled=False):
            head = padded_head(HeadTensors(hidden, weight, bias, lora_a, lora_b, scaling), temperature.dtype)
            local = statistics_chunks(hidden, head, ids, temperature, 0.0, entropy, budget, backend)
        live = ids != IGNORED
        state = torch.where(live, one_softmax(torch.where(live, local, 0.0), owned, entropy, shard), 0.0)
        ctx.save_for_backward(hidden, weight, bias, lora_a, lora_b, scaling, ids, temperature, state)
        ctx.rest = shard, budget, backend
        return state[[LOGP, ENTROPY]]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Form the logits again, and sum dL/dhidden and dL/dlora_A over the processes."""
        refuse_second_order("linear_selective_log_softmax")
        *tensors, ids, temperature, state = ctx.saved_tensors
        given, (shard, budget, backend) = HeadTensors(*tensors), ctx.rest
        hidden, wanted = given.hidden, ctx.needs_input_grad[:LEAVES]
        slopes = torch.cat((upstream, upstream.new_zeros(1, upstream.shape[1])))
        # the eager one computes the normaliser anew
        apply = apply_given_normaliser if backend == "eager" else choice.load(backend).apply
        with torch.autocast(hidden.device.type, enabled=False):
            head = padded_head(given, temperature.dtype)
            rows = hidden, head, ids, state, slopes, temperature
            gradients = slope_chunks(*rows, 0.0, wanted, budget, backend, apply)
        result: list[Tensor | None] = []
        for name, like, total, want in zip(HEAD_NAMES, given, gradients.tensors, wanted, strict=False):
            if want and like is not None:
                whole = shard.total_of(total) if name in ("hidden", "lora_A") else total[: shard.rows]
                result.append(whole.to(like.dtype))
            else:
                result.append(None)
        return *result, *(None,) * 7


def padded_head(given: HeadTensors, result: torch.dtype) -> LinearHead:
    """Return the head of this process with one more row, whose logit is ABSENT whatever the hidden state."""
    hidden, weight, bias, lora_a, lora_b, scaling = given
    rows, pad = (0, 0, 0, 1), torch.nn.functional.pad
    values = weight.new_zeros(len(weight), dtype=result) if bias is None else bias.detach().to(result)
    lora = lora_a, None if lora_b is None else pad(lora_b.detach(), rows), scaling
    return LinearHead.of(hidden, pad(weight.detach(), rows), pad(values, (0, 1), value=ABSENT), *lora, result=result)


class ShardedLogits(torch.autograd.Function):
    """(log-probabilities, entropy) of the ids, (2, N), from this process's columns of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        temperature: Tensor,
        entropy: int,
        shard: VocabularyShard,
        backend: str,
    ) -> Tensor:
        """Compute them; arguments as in `ShardedStatistics`, logits (T, V_r) or (B, L, V_r), which are copied."""
        ids, owned = shard.local_ids(ids)
        padded = torch.nn.functional.pad(logits.detach().reshape(-1, shard.rows), (0, 1), value=ABSENT)
        local = choice.load(backend).statistics(padded, ids, temperature, 0.0, entropy)
        live = ids != IGNORED
        state = torch.where(live, one_softmax(torch.where(live, local, 0.0), owned, entropy, shard), 0.0)
        ctx.save_for_backward(padded, ids, temperature, state)
        ctx.rest = tuple(logits.shape), backend
        return state[[LOGP, ENTROPY]]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Write dL/dlogits of this process's columns; nothing has to be summed."""
        refuse_second_order("selective_log_softmax")
        padded, ids, temperature, state = ctx.saved_tensors
        shape, backend = ctx.rest
        slopes, grad = torch.cat((upstream, upstream.new_zeros(1, upstream.shape[1]))), torch.zeros_like(padded)
        if backend == "eager":
            live = (ids != IGNORED).nonzero().squeeze(1)
            part = padded[live].to(temperature.dtype)
            by_row = ids[live], state[:, live], slopes[:, live], at_rows(temperature, live)
            apply_given_normaliser(part, *by_row, 0.0, part)
            grad[live] = part.to(grad.dtype)
        else:
            choice.load(backend).apply(padded, ids, state, slopes, temperature, 0.0, grad)
        return grad[:, :-1].reshape(shape), None, None, None, None, None


def apply_given_normaliser(
    logits: Tensor, ids: Tensor, state: Tensor, slopes: Tensor, temperature: Tensor, softcap: float, grad: Tensor
) -> None:
    """Write dL/dlogits (n, V) of live rows as the eager backend does, but with the normaliser of the state."""
    normaliser = (state[MAX2] + state[LOG2_SUM]) * LN_2
    rows = Distributions(logits / divisors(temperature) - normaliser[:, None], None, state[MAX2], state[LOG2_SUM])
    grad.copy_(apply_rows(rows, ids, temperature, None, slopes, state[ENTROPY], None, None))
