"""Log-probability, entropy and full KL of rows of logits, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.eager.distributions import Distributions, distributions, row_sum, target_logps
from ...checks import check_live_ids, check_live_temperatures
from ...tensor_kinds import is_plain


def masked_logits(logits: Tensor, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (T, V) or (B, L, V) as (N, V) of dtype, with 0 on dead rows, whatever they hold."""
    return torch.where(live[:, None], logits.reshape(-1, logits.shape[-1]), 0.0).to(dtype)


def row_distributions(logits: Tensor, temperature: Tensor, softcap: float) -> Distributions:
    """Compute the distributions of logits (N, V); softcap 0.0 is none.

    temperature: 0-d, or (N,), 1 on dead rows. One of a live row that is not positive and finite is a ValueError where
    an id outside of the vocabulary is an IndexError (`row_logps`), else NaN.
    """
    if temperature.device.type == "cpu" and is_readable(temperature):
        check_live_temperatures(temperature)
    return distributions(softcap * torch.tanh(logits / softcap) if softcap else logits, temperature, None)


def row_logps(rows: Distributions, ids: Tensor, live: Tensor) -> Tensor:
    """Return the log-probability of each id, (N,); 0 on dead rows.

    An id outside [0, V) is an IndexError where it can be seen. It cannot on a GPU, which would have to be waited for,
    nor where each example of a vmap has ids of its own: its log-probability is NaN then.
    """
    vocabulary = rows.log_probs.shape[-1]
    if ids.device.type == "cpu" and is_readable(ids, live):
        check_live_ids(ids[live], vocabulary)
    known = live & (ids >= 0) & (ids < vocabulary)
    logps = target_logps(rows, torch.where(known, ids, 0))
    return torch.where(live, torch.where(known, logps, torch.nan), 0.0)


def row_entropies(rows: Distributions, live: Tensor) -> Tensor:
    """Compute H = -sum_v p_v log p_v, (N,); 0 on dead rows."""
    probs = rows.probs
    return torch.where(live, -row_sum(probs * torch.where(probs == 0, 0.0, rows.log_probs)), 0.0)


def row_kls(rows: Distributions, reference: Distributions, live: Tensor) -> Tensor:
    """Compute KL(p || q) = sum_v p_v (log p_v - log q_v), (N,); 0 on dead rows."""
    probs = rows.probs
    difference = torch.where(probs == 0, 0.0, rows.log_probs - reference.log_probs.detach())
    return torch.where(live, row_sum(probs * difference), 0.0)


def is_readable(*tensors: Tensor) -> bool:
    """Return whether the values are at hand: not traced, not fake, not batched by vmap."""
    return not torch.compiler.is_compiling() and all(is_plain(x) and not _is_batched(x) for x in tensors)


def _is_batched(value: Tensor) -> bool:
    functorch = torch._C._functorch
    while functorch.is_gradtrackingtensor(value):
        value = functorch.get_unwrapped(value)
    return functorch.is_functorch_wrapped_tensor(value)
