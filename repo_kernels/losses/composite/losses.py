"""The four functions, and the loss of given log-probabilities, out of differentiable operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.codes import ENTROPY_NONE, IGNORED, KL_FULL, KL_NAMES, ROWS, SCALARS, Code
from ...backends.eager.dense import VALUES, DenseLoss, prepare
from ...backends.eager.reduction import totals
from ...backends.eager.terms import constant_zero, token_flags, token_inputs, token_rows, token_terms
from ...backends.interface import Loss, compute_dtype, device_scalar
from ..heads.lora import HeadTensors
from .rows import masked_logits, row_distributions, row_entropies, row_kls, row_logps
from .surrogates import rows_and_flags

# A loss, 0-d or (N,) without aggregation, ROWS (5, N) and STATS (18,), the last two detached.
Outputs = tuple[Tensor, Tensor, Tensor]
# hidden states (T, H) or (B, L, H), weight (V, H), bias (V,) or None; those of a policy may have a low-rank part
Head = tuple[Tensor, Tensor, Tensor | None] | HeadTensors


def statistics(logits: Tensor, ids: Tensor, temperature: Tensor, softcap: float, entropy: int) -> Tensor:
    """Compute logp and entropy, the first two rows of STATE (7, N), as (2, N). temperature: 0-d or (N,)."""
    live = ids != IGNORED
    if temperature.ndim:
        temperature = torch.where(live, temperature, 1.0)
    rows = row_distributions(masked_logits(logits, live, temperature.dtype), temperature, softcap)
    logps = row_logps(rows, ids, live)
    return torch.stack((logps, torch.zeros_like(logps) if entropy == ENTROPY_NONE else row_entropies(rows, live)))


def statistics_of_hidden(head: Head, ids: Tensor, temperature: Tensor, softcap: float, entropy: int) -> Tensor:
    """Compute `statistics` from hidden states."""
    return statistics(head_logits(head, ids != IGNORED, temperature.dtype), ids, temperature, softcap, entropy)


def loss_of_logits(logits: Tensor, ref_logits: Tensor | None, loss: Loss) -> Outputs:
    """Compute the outputs of a loss from logits; derivatives of its value are multiplied by grad_scale."""
    value, rows, stats = _loss_of_rows(logits, ref_logits, loss)
    scale = device_scalar(loss.scalars[SCALARS.index("grad_scale")], value.dtype, value.device)
    return value.detach() + scale * constant_zero(value), rows, stats


def loss_of_statistics(logps: Tensor, entropy: Tensor | None, prepared: DenseLoss, loss: Loss) -> Outputs:
    """Compute `loss_of_logits` from log-probabilities and entropy, (T,) or (B, L), 0 on dead rows, with their graph."""
    entropy = None if entropy is None else entropy.reshape(-1)
    value, rows, stats = loss_of_logps(logps.reshape(-1), entropy, None, loss, prepared)
    scale = device_scalar(loss.scalars[SCALARS.index("grad_scale")], value.dtype, value.device)
    return value.detach() + scale * constant_zero(value), rows, stats


def _loss_of_rows(logits: Tensor, ref_logits: Tensor | None, loss: Loss) -> Outputs:
    """Compute the outputs of a loss from logits (T, V), (B, L, V) or, whatever the leading shape, (N, V)."""
    prepared, dtype = prepare(logits, loss), compute_dtype(logits)
    temperature, live = prepared.temperature, prepared.live
    rows = row_distributions(masked_logits(logits, live, dtype), temperature, loss.softcap)
    logps, kl, entropy = row_logps(rows, prepared.ids, live), None, None
    if loss.entropy != ENTROPY_NONE:
        entropy = row_entropies(rows, live)
    if ref_logits is not None and Code.unpack(loss.code).kl == KL_FULL:
        reference = masked_logits(ref_logits.detach(), live, dtype)
        kl = row_kls(rows, row_distributions(reference, temperature, loss.softcap), live)
    return loss_of_logps(logps, entropy, kl, loss, prepared)


def loss_of_logps(logps: Tensor, entropy: Tensor | None, kl: Tensor | None, loss: Loss, prepared: DenseLoss) -> Outputs:
    """Compute the outputs of a loss from what its rows give.

    Args:
        logps, entropy, kl: (N,), 0 on dead rows; entropy or the full KL is None where the loss has none.
        loss: the loss.
        prepared: the same by row.
    """
    coef, code, live = prepared.coef, Code.unpack(loss.code), prepared.live
    values = {name: torch.where(live, x, VALUES.get(name, 0.0)) for name, x in prepared.values.items()}
    inputs = token_inputs(values, coef, code)
    if code.cispo or code.sequence_ratio:
        rows, flags = rows_and_flags(inputs, logps, entropy, prepared, code)
    else:
        terms = token_terms(inputs, logps, entropy, kl, coef, KL_NAMES[code.kl], code.kl_importance_weighted)
        rows, flags = token_rows(terms, logps, entropy), token_flags(terms, inputs.unsafe)
    rows, flags = torch.where(live, rows, 0.0), torch.where(live, flags, 0)
    value, stats = totals(prepared, dict(zip(ROWS, rows.unbind(0), strict=True)), flags)
    return (rows[0] if loss.per_token else value), rows.detach(), stats.detach()


def head_logits(head: Head, live: Tensor, result: torch.dtype) -> Tensor:
    """Compute logits (N, V) of the dtype `result`; dead rows of the hidden states are read as 0."""
    hidden, weight, bias, lora_a, lora_b, scaling = HeadTensors(*head)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = masked_logits(hidden, live, result)
        logits = rows @ weight.to(result).t()
        if lora_a is not None and lora_b is not None and scaling is not None:
            logits = logits + scaling * (rows @ lora_a.to(result).t()) @ lora_b.to(result).t()
        return logits if bias is None else logits + bias.to(result)


def loss_of_hidden(head: Head, reference: Head | None, loss: Loss) -> Outputs:
    """Compute the outputs of a loss from hidden states."""
    result, live = compute_dtype(head[0]), prepare(head[0], loss).live
    logits = head_logits(head, live, result)
    return _loss_of_rows(logits, None if reference is None else head_logits(reference, live, result), loss)


def loss_of_given_logps(logps: Tensor, loss: Loss) -> Outputs:
    """Compute the outputs of a loss from log-probabilities (T,) or (B, L) that the caller has computed."""
    prepared = prepare(logps, loss)
    given = torch.where(prepared.live, logps.reshape(-1), torch.zeros_like(logps).reshape(-1))
    return loss_of_logps(given, None, None, loss, prepared)
