"""The clipped policy loss with a rectified cost: of logits, of hidden states and a head, of log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..backends.choice import choose_backend
from ..backends.codes import ENTROPY_NONE, ENTROPY_VALUE, SCALARS
from ..backends.eager.dense import prepare
from ..backends.interface import Loss, compute_dtype, scalar_vector
from ..checks import (
    Scalar,
    check_bool,
    check_chunk,
    check_head,
    check_logps,
    check_matrix,
    check_tensor,
    describe,
)
from ..keywords import takes
from ..tensor_kinds import check_memory, is_plain, is_traced, is_transformed, makers_like, operate
from .arguments import make_logps_loss, make_loss
from .autograd import FusedLoss, InplaceLoss, check_inplace, loss_without_gradient
from .composite import losses as composite
from .heads.lora import HEAD_NAMES, head_tensors
from .heads.operators import gradients_wanted, linear_loss
from .inputs import HiddenStates, LinearRepoLossCall, LinearRepoLossInputs, LogpsLossCall, RepoLossCall, RepoLossInputs
from .kept import kept_of_loss, refuse_with_kept
from .logps import linear_selective_log_softmax, selective_log_softmax
from .ops import fused_loss
from .options import LossOptions
from .output import RepoLossOutput, make_output
from .parallel.shard import local_head

WHOLE_VOCABULARY = (
    "kl_estimator='full' takes a whole vocabulary; got one divided among processes: use 'k1', 'k2' or 'k3', which take "
    "ref_logps"
)
HEADS = (*HEAD_NAMES, "ref_hidden", "ref_weight", "ref_bias")


@takes(RepoLossCall)
def repo_loss(call: RepoLossCall) -> RepoLossOutput:
    """Compute the clipped policy loss with the rectified cost advantage, a KL to a reference and an entropy bonus.

    For each live token, with aggregation weight w and importance weight v (RePO, arXiv:2410.19933)::

        A   = A_R - lam * A_C            rectified: A_C = cost_advantages, or {C - d}^+ - cost_baselines
                                         split:     A_C * 1[C > d]          lagrangian: A_C
        rho = exp(clamp(log pi - old_logps, +-20))
        l   = w * (v * -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + beta * kappa - entropy_coef * H)

    kappa is the estimate of the KL, times rho with kl_importance_weighted. Below, "leading shape" is (T,) or (B, L), a
    scalar is a float or a 0-d tensor, whose value is not checked, and a token is live if response_mask is True there
    and its id is not -100. Values of other tokens are never read; their loss and gradient are 0.

    Returns:
        RepoLossOutput. Without a live token the loss is 0 and so is the gradient.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape, device, value or companion; the message
            names it.
        IndexError: a live id is outside [0, V). The Triton backend, which does not wait for the device to look, gives
            NaN in that row instead.
        RuntimeError: a second backward with inplace=True, or create_graph=True.
    """
    return logits_loss(call, call, call.temperature, call.inplace, call.backend, call.group)


@takes(LinearRepoLossCall)
def linear_repo_loss(call: LinearRepoLossCall) -> RepoLossOutput:
    """Compute `repo_loss` of logits = hidden @ weight^T + bias, of which one chunk of live tokens exists at a time.

    Differentiable in hidden, weight and bias, of a `LoraHead` in lora_A and lora_B; what is frozen costs no GEMM for
    its gradient. The gradients of a summed loss are computed with it, in fp32 sums (fp64 for fp64 hidden states), and
    backward scales them in place; with retain_graph=True it copies them instead. With loss_agg_mode="none" backward
    forms the logits again.

    On CUDA the GEMMs take the dtype of hidden, to which a weight of another dtype is cast once per call, and return
    fp32 if they can. Elsewhere bf16 and fp16 are computed in fp32, with an fp32 copy of the weight during the call.
    Autocast changes nothing. The host waits for the device once per call, for the number of live tokens.

    With `group`, or with a DTensor weight that is sharded on dim 0, every process has a part of the vocabulary and all
    hidden states: its logits are those of its part, two all-reduces of a few numbers per token and one of dL/dhidden
    join them, and loss and statistics are the same in every process. The logits are formed twice then, and there is no
    full KL.

    Memory: for n live tokens in chunks of c, c (4 V + 4 H) + 4 n H + 4 V H bytes beside the inputs; the last two are
    the gradients of hidden and weight in fp32, where wanted. A `LoraHead` of rank r has 4 r (V + H) for its gradients
    in place of 4 V H, and 8 c r. Add 2 c V for a gradient in bf16 or fp16 on CUDA, and
    4 c V for the logits of a reference. With a vocabulary divided among P processes, V is that of the process, V / P.

    Returns:
        RepoLossOutput, as `repo_loss`.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as `repo_loss`.
    """
    return head_loss(call, call, call.temperature, call.chunk_tokens, call.chunk_bytes, call.backend, call.group)


@takes(LogpsLossCall)
def repo_loss_from_logps(call: LogpsLossCall) -> RepoLossOutput:
    """Compute `repo_loss` from log-probabilities that the caller has computed, for a loop that has no logits.

    Plain PyTorch: differentiable in logps any number of times, whatever the device. There is no entropy and no full KL,
    which need the logits. log pi must be the log-probabilities of the policy that sampled, at its temperature.

    Returns:
        RepoLossOutput, as `repo_loss`; its logps are the detached argument, 0 on dead tokens.

    Raises:
        TypeError, ValueError: as `repo_loss`.
    """
    logps = check_logps(call.logps)
    loss = make_logps_loss(logps, call, call)
    check_memory(logps=logps, **loss.named_tensors)
    return make_output(loss, *composite.loss_of_given_logps(logps, loss))


def logits_loss(
    options: LossOptions,
    inputs: RepoLossInputs,
    temperature: Scalar,
    inplace: bool,
    backend: str | None,
    group: ProcessGroup | None,
) -> RepoLossOutput:
    """Compute `repo_loss` of options, inputs and the temperature of this call."""
    logits, ref_logits = check_matrix("logits", inputs.logits), inputs.ref_logits
    backend = choose_backend(backend, logits)
    if ref_logits is not None:
        check_matrix("ref_logits", ref_logits)
        check_tensor("ref_logits", ref_logits, (tuple(logits.shape),), (logits.dtype,), logits)
        ref_logits = ref_logits.detach()
    if group is not None and options.kl_estimator == "full":
        raise ValueError(WHOLE_VOCABULARY)
    loss = make_loss(logits, options, inputs, temperature, ref_logits is not None, "ref_logits")
    if inputs.kept is not None:
        refuse_with_kept(inplace, group is not None)
        check_memory(logits=logits, ref_logits=ref_logits, **loss.named_tensors)
        sets, softcap = kept_of_loss(inputs.kept, loss, logits, logits.shape[-1]), loss.softcap
        logits = sets.of_logits(logits, softcap)
        ref_logits = None if ref_logits is None else sets.of_logits(ref_logits, softcap)
        loss = sets.loss(loss)
    return _loss_of_logits(logits, ref_logits, loss, options.logps_first, inplace, backend, group)


def _loss_of_logits(
    logits: Tensor,
    ref_logits: Tensor | None,
    loss: Loss,
    logps_first: bool,
    inplace: bool,
    backend: str,
    group: ProcessGroup | None,
) -> RepoLossOutput:
    """Compute a loss whose arguments are checked."""
    if group is not None or (logps_first and not is_transformed()):
        logps = functools.partial(selective_log_softmax, logits, group=group)
        return _logps_first(logits, loss, logps, inplace, backend)
    direct = _runs_directly(logits, ref_logits, loss)
    if direct and backend != "cpu":  # which looks itself
        check_memory(logits=logits, ref_logits=ref_logits, **loss.named_tensors)
    inplace = check_inplace(inplace, logits, direct)
    want_grad = logits.requires_grad and torch.is_grad_enabled()
    if is_transformed():
        value, rows, stats = composite.loss_of_logits(logits, ref_logits, loss)
    elif not direct:
        tensors = {"logits": logits, "ref_logits": ref_logits}
        options_of = _operator_options(loss, logits)
        value, rows, stats, *_ = _operate(fused_loss, tensors, loss, *options_of, want_grad, backend)
        rows, stats = rows.detach(), stats.detach()
    elif not want_grad:
        value, rows, stats = loss_without_gradient(logits, ref_logits, loss, backend)
    elif inplace:
        # the detached alias shares the version counter, so that autograd sees the logits change
        value, rows, stats = InplaceLoss.apply(logits, ref_logits, loss, logits.detach(), backend)
    else:
        value, rows, stats = FusedLoss.apply(logits, ref_logits, loss, backend)
    return make_output(loss, value, rows, stats)


def head_loss(
    options: LossOptions,
    inputs: LinearRepoLossInputs,
    temperature: Scalar,
    chunk_tokens: int | None,
    chunk_bytes: int | None,
    backend: str | None,
    group: ProcessGroup | None,
) -> RepoLossOutput:
    """Compute `linear_repo_loss` of options, inputs and the temperature of this call."""
    hidden = inputs.hidden
    weight, bias, shard = local_head(inputs.weight, inputs.bias, group)
    head = head_tensors(hidden, weight, bias)
    backend = choose_backend(backend, hidden)
    check_chunk(chunk_tokens, chunk_bytes)
    if shard is not None and options.kl_estimator == "full":
        raise ValueError(WHOLE_VOCABULARY)
    reference = _linear_reference(inputs)
    loss = make_loss(hidden, options, inputs, temperature, reference is not None, "ref_hidden and ref_weight")
    if inputs.kept is not None:
        refuse_with_kept(False, shard is not None)
        check_memory(**loss.named_tensors)
        sets, softcap = kept_of_loss(inputs.kept, loss, hidden, weight.shape[0]), loss.softcap
        logits = sets.of_head(head, softcap, chunk_tokens, chunk_bytes)
        ref_logits = None if reference is None else sets.of_head(reference, softcap, chunk_tokens, chunk_bytes)
        return _loss_of_logits(logits, ref_logits, sets.loss(loss.unscaled), options.logps_first, False, backend, None)
    if is_transformed() and shard is None:
        return make_output(loss, *composite.loss_of_hidden(head, reference, loss))
    if options.logps_first or shard is not None:
        rows = functools.partial(
            linear_selective_log_softmax,
            hidden,
            inputs.weight,
            bias=inputs.bias,
            chunk_tokens=chunk_tokens,
            chunk_bytes=chunk_bytes,
            group=group,
        )
        return _logps_first(hidden, loss.unscaled, rows, False, backend)
    tensors = dict(zip(HEADS, (*head, *(reference or (None, None, None))), strict=True))
    check_memory(**tensors, **loss.named_tensors)
    how = gradients_wanted(head), chunk_tokens, chunk_bytes, backend
    value, rows, stats, *_ = _operate(linear_loss, tensors, loss, *_operator_options(loss, hidden), *how)
    return make_output(loss, value, rows.detach(), stats.detach())


def _logps_first(
    source: Tensor, loss: Loss, statistics: Callable[..., Any], inplace: bool, backend: str
) -> RepoLossOutput:
    """Compute a loss from log-probabilities, which one pass over the logits gives; its gradient is another.

    Args:
        source: logits or hidden states. statistics: computes log-probabilities and entropy of ids.
    """
    check_bool("inplace", inplace)
    if inplace:
        raise ValueError(
            "inplace=True is for surrogate='clip', ratio_level='token' and a whole vocabulary, where one pass over the "
            "logits is enough; use inplace=False"
        )
    check_memory(**loss.named_tensors)
    prepared = prepare(source, loss)
    with_entropy, leading, temperature = loss.entropy != ENTROPY_NONE, loss.arguments.leading, prepared.temperature
    result = statistics(
        prepared.ids.view(leading),
        # as it was given: on the meta device a scalar tensor has no value to check
        temperature=temperature.view(leading) if temperature.ndim else loss.scalars[SCALARS.index("temperature")],
        softcap=loss.softcap or None,
        return_entropy=with_entropy,
        backend=backend,
    )
    logps, entropy = result if with_entropy else (result, None)
    if loss.entropy == ENTROPY_VALUE and entropy is not None:
        entropy = entropy.detach()
    return make_output(loss, *composite.loss_of_statistics(logps, entropy, prepared, loss))


def _operator_options(loss: Loss, source: Tensor) -> tuple[Tensor, int, float, int]:
    """Return what an operator takes of a loss beside its tensors."""
    with makers_like(source):
        scalars = scalar_vector(loss.scalars, compute_dtype(source), source.device)
    return scalars, loss.code, loss.softcap, loss.entropy


def _operate(operator: Callable[..., Any], tensors: dict[str, Tensor | None], loss: Loss, *rest: Any) -> Any:
    """Call an operator with these tensors and those of the loss; one that refuses it is named."""
    named = {**tensors, **loss.named_tensors}
    return operate(operator, named, *tensors.values(), loss.arguments.tensors, *rest)


def _runs_directly(logits: Tensor, ref_logits: Tensor | None, loss: Loss) -> bool:
    """Return whether nothing has to see an operator: no tracing, and tensors with memory of their own."""
    if is_traced() or is_transformed() or logits.is_meta:
        return False
    scalars = [value for value in loss.scalars if isinstance(value, Tensor)]
    return is_plain(logits, ref_logits, *loss.arguments.tensors, *scalars)


def _linear_reference(inputs: HiddenStates) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Check the reference of the full KL and return its (hidden states, weight, bias), or None without one."""
    hidden, ref_hidden, ref_weight, ref_bias = inputs.hidden, inputs.ref_hidden, inputs.ref_weight, inputs.ref_bias
    if ref_hidden is None and ref_weight is None:
        if ref_bias is not None:
            raise ValueError("ref_bias needs ref_hidden and ref_weight; got None for both")
        return None
    if ref_hidden is None or ref_weight is None:
        missing, given = ("ref_hidden", "ref_weight") if ref_hidden is None else ("ref_weight", "ref_hidden")
        raise ValueError(f"{missing} is required with {given}; got None")
    check_head("ref_", ref_hidden, ref_weight, ref_bias, tuple(hidden.shape[:-1]))
    if ref_hidden.device != hidden.device:
        raise ValueError(f"ref_hidden must be on {hidden.device} with hidden; got {describe(ref_hidden)}")
    rows = inputs.weight.shape[0]
    if ref_weight.shape[0] != rows:
        raise ValueError(f"ref_weight must have V = {rows} rows like weight; got {describe(ref_weight)}")
    return ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach()
