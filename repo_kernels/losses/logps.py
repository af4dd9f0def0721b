"""selective_log_softmax and its linear form: log-probabilities of given tokens, differentiable, with the entropy."""

from __future__ import annotations

from torch import Tensor

from ..backends.choice import choose_backend
from ..backends.interface import ENTROPY_NONE, ENTROPY_VALUE
from ..checks import Scalar, check_chunk_tokens, check_head, check_matrix, check_temperature, describe
from .arguments import Layout, make_layout, scalar_vector
from .linear_ops import gradients_wanted, linear_statistics
from .ops import row_statistics


def _check_tail(temperature: Scalar, softcap: float | None, return_entropy: bool) -> None:
    check_temperature(temperature, softcap)
    if not isinstance(return_entropy, bool):
        raise TypeError(f"return_entropy must be a bool; got {describe(return_entropy)}")


def _outputs(state: Tensor, layout: Layout, return_entropy: bool) -> Tensor | tuple[Tensor, Tensor]:
    """logps, or (logps, entropy), in the leading shape from the STATE (7, N)."""
    # copies, which may be overwritten: the backward reads the state
    logps, entropy = state[0].clone().view(layout.leading), state[1].clone().view(layout.leading)
    return (logps, entropy) if return_entropy else logps


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(softcap(logits) / temperature)[token_ids], and the entropy, without keeping the (T, V) log-probs.

    Args:
        logits: (T, V) or (B, L, V); fp32, bf16, fp16 or fp64; any row stride, unit column stride.
        token_ids: leading shape, int64 or int32; rows with -100 give 0 and gradient 0.
        temperature: float > 0 or 0-d tensor. softcap: float > 0 or None.
        return_entropy: also return H in nats.
        backend: None (by device: Triton on a GPU, C++ on the CPU, PyTorch for fp64), "triton", "cpu" or "eager".

    Returns:
        logps, or (logps, entropy): leading shape, fp32 (fp64 for fp64 logits), both differentiable in the logits.

    Raises:
        TypeError, ValueError: a wrong argument, named. IndexError: a live id outside [0, V) (Triton: that row is NaN).
    """
    check_matrix("logits", logits)
    backend = choose_backend(backend, logits)
    _check_tail(temperature, softcap, return_entropy)
    layout = make_layout(tuple(logits.shape[:-1]), token_ids, None, None, logits)
    scalars = scalar_vector(logits, temperature=temperature)
    entropy = ENTROPY_VALUE if return_entropy else ENTROPY_NONE
    state = row_statistics(logits, layout.ids, scalars, float(softcap or 0.0), entropy, backend)
    return _outputs(state, layout, return_entropy)


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """selective_log_softmax of logits = hidden @ weight^T + bias, which exist only one chunk of live tokens at a time.

    One GEMM forward; the backward forms the logits again (three GEMMs, two with a frozen head). Types, memory and the
    one wait for the device are those of linear_repo_loss.

    Args:
        hidden: (T, H) or (B, L, H). weight: (V, H), bias: (V,), each of hidden's dtype, or fp32 for bf16 and fp16.
        chunk_tokens: live tokens per chunk; None: even chunks of at most 64 MB of logits.
        The other arguments, the result and the errors are those of selective_log_softmax; differentiable in hidden,
        weight and bias.
    """
    check_head("", hidden, weight, bias)
    backend = choose_backend(backend, hidden)
    _check_tail(temperature, softcap, return_entropy)
    check_chunk_tokens(chunk_tokens)
    layout = make_layout(tuple(hidden.shape[:-1]), token_ids, None, None, hidden)
    state = linear_statistics(
        hidden,
        weight,
        bias,
        layout.ids,
        scalar_vector(hidden, temperature=temperature),
        float(softcap or 0.0),
        ENTROPY_VALUE if return_entropy else ENTROPY_NONE,
        gradients_wanted(hidden, weight, bias),
        chunk_tokens,
        backend,
    )
    return _outputs(state, layout, return_entropy)
