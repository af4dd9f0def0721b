"""Log-probabilities of given tokens and the entropy, differentiable, from logits or from hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from ..backends.choice import choose_backend
from ..backends.codes import ENTROPY_NONE, ENTROPY_VALUE
from ..checks import Scalar, check_bool, check_chunk, check_matrix, check_softcap
from ..tensor_kinds import check_memory, is_transformed, operate
from .arguments import check_ids
from .composite import losses as composite
from .heads.lora import HEAD_NAMES, LoraHead, head_tensors
from .heads.operators import gradients_wanted, linear_statistics
from .kept import KeptSets, refuse_with_kept
from .ops import row_statistics
from .parallel.operators import divided_linear_statistics, divided_statistics
from .parallel.shard import VocabularyShard, check_divided, check_group, local_head
from .temperature import statistics_temperature


def _outputs(state: Tensor, leading: tuple[int, ...], return_entropy: bool) -> Tensor | tuple[Tensor, Tensor]:
    """Take logps, or (logps, entropy), in the leading shape from the STATE (7, N)."""
    # copies, which the caller may overwrite: backward reads the state
    logps, entropy = state[0].clone().view(leading), state[1].clone().view(leading)
    return (logps, entropy) if return_entropy else logps


def selective_log_softmax(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    kept: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log softmax(softcap(logits) / temperature) at token_ids without keeping all (T, V) log-probabilities.

    Args:
        logits: (T, V) of packed tokens or (B, L, V); fp32, bf16, fp16 or fp64; any row strides, unit column stride.
        token_ids: leading shape, int64 or int32, in [0, V); tokens with id -100 give 0 and gradient 0.
        temperature: a float > 0 or a 0-d tensor, whose value is not checked; or a tensor of the leading shape, (B,) or
            (B, 1), of any floating dtype, as `repo_loss` takes it. It gets no gradient.
        softcap: a float > 0 in units of the logits, or None: logits become softcap * tanh(logits / softcap).
        return_entropy: return the entropy of each row too.
        backend: "triton", "cpu", "eager", or None to choose by device and dtype: Triton on a GPU, C++ on the CPU,
            PyTorch for fp64.
        group: the processes among which the vocabulary is divided, as `repo_loss`; None: logits are whole.
        kept: leading shape + (K,), int64 or int32, as `repo_loss`; None: the whole vocabulary.

    Returns:
        logps, or (logps, entropy), in nats: leading shape, fp32 (fp64 for fp64 logits), differentiable in the logits.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device or value; the message names it.
        IndexError: an id is outside [0, V) and not -100. The Triton backend, which does not wait for the device to
            look, gives NaN in that row instead.
        RuntimeError: create_graph=True.
    """
    check_matrix("logits", logits)
    check_group(group)
    backend = choose_backend(backend, logits)
    check_softcap(softcap)
    check_bool("return_entropy", return_entropy)
    leading = tuple(logits.shape[:-1])
    ids = check_ids(token_ids, leading, logits).reshape(-1)
    by = statistics_temperature(temperature, logits)
    entropy = ENTROPY_VALUE if return_entropy else ENTROPY_NONE
    if kept is not None:
        refuse_with_kept(False, group is not None)
        check_memory(logits=logits, token_ids=ids)
        sets = KeptSets.of(kept, ids, logits, logits.shape[-1])
        logits, ids, softcap = sets.of_logits(logits, float(softcap or 0.0)), sets.ids, None
    rows: Any = (logits, ids, by, float(softcap or 0.0), entropy)
    if is_transformed() and group is None:
        return _outputs(composite.statistics(*rows), leading, return_entropy)
    named = {"logits": logits, "token_ids": ids, "temperature": by}
    check_memory(**named)
    if group is None:
        state = operate(row_statistics, named, *rows, backend)
    else:
        check_divided()
        shard = VocabularyShard.equal(group, logits.shape[-1])
        state = operate(divided_statistics, named, *rows, shard.name, shard.numbers, backend)
    return _outputs(state, leading, return_entropy)


def linear_selective_log_softmax(
    hidden: Tensor,
    weight: Tensor | LoraHead,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    return_entropy: bool = False,
    chunk_tokens: int | None = None,
    chunk_bytes: int | None = None,
    backend: str | None = None,
    group: ProcessGroup | None = None,
    kept: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `selective_log_softmax` of logits = hidden @ weight^T + bias, one chunk of live tokens at a time.

    Forward takes one GEMM. Backward forms the logits again and takes three, or two with a frozen head or a
    `LoraHead`. Dtypes, memory and the one wait for the device are those of `linear_repo_loss`.

    Args:
        hidden: (T, H) of packed tokens or (B, L, H); fp32, bf16, fp16 or fp64; unit column stride.
        weight: (V, H), dtype of hidden, or fp32 for bf16 and fp16 hidden states, or a `LoraHead`.
        token_ids: leading shape, int64 or int32, in [0, V); tokens with id -100 give 0 and gradient 0.
        bias: (V,), same choice of dtypes, or None.
        temperature, softcap, return_entropy, backend: as `selective_log_softmax`.
        chunk_tokens, chunk_bytes: the size of a chunk or None, as `linear_repo_loss`.
        group: the processes among which the vocabulary is divided, as `linear_repo_loss`; None: weight is whole.
        kept: leading shape + (K,), int64 or int32, as `repo_loss`; None: the whole vocabulary.

    Returns:
        logps, or (logps, entropy), as `selective_log_softmax`, differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `selective_log_softmax`.
    """
    weight, bias, shard = local_head(weight, bias, group)
    head = head_tensors(hidden, weight, bias)
    backend = choose_backend(backend, hidden)
    check_softcap(softcap)
    check_bool("return_entropy", return_entropy)
    check_chunk(chunk_tokens, chunk_bytes)
    leading = tuple(hidden.shape[:-1])
    ids = check_ids(token_ids, leading, hidden).reshape(-1)
    by = statistics_temperature(temperature, hidden)
    if kept is not None:
        refuse_with_kept(False, shard is not None)
        check_memory(token_ids=ids)
        sets = KeptSets.of(kept, ids, hidden, weight.shape[0])
        logits = sets.of_head(head, float(softcap or 0.0), chunk_tokens, chunk_bytes)
        places = sets.ids.view(leading)
        return selective_log_softmax(
            logits, places, temperature=temperature, return_entropy=return_entropy, backend=backend
        )
    options = by, float(softcap or 0.0), ENTROPY_VALUE if return_entropy else ENTROPY_NONE
    named = {**dict(zip(HEAD_NAMES, head, strict=True)), "token_ids": ids, "temperature": by}
    if is_transformed() and shard is None:
        return _outputs(composite.statistics_of_hidden(head, ids, *options), leading, return_entropy)
    check_memory(**named)
    rows, how = (*head, ids, *options, gradients_wanted(head)), (chunk_tokens, chunk_bytes, backend)
    if shard is None:
        state = operate(linear_statistics, named, *rows, *how)
    else:
        check_divided()
        state = operate(divided_linear_statistics, named, *rows, shard.name, shard.numbers, *how)
    return _outputs(state, leading, return_entropy)
