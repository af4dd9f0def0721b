"""repo_loss and linear_repo_loss: checks, autograd, choice of backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.choice import choose_backend
from ..backends.interface import SCALARS, TOKENS
from ..checks import Scalar, check_chunk_tokens, check_head, check_matrix, check_tensor, describe
from .arguments import LossArguments, make_arguments
from .autograd import InplaceLoss
from .linear_ops import gradients_wanted, linear_loss
from .ops import fused_loss
from .stats import LossStats, collect_stats, row_sum


@dataclass(frozen=True)
class RepoLossOutput:
    """What repo_loss and linear_repo_loss return. Everything but `loss` is detached; fp32 (fp64 for fp64 input).

    loss: 0-d, or the leading shape (T,) / (B, L) with loss_agg_mode="none".
    logps: leading shape, log-probability of each token id; 0 on masked and ignored rows, like entropy and kl.
    entropy: leading shape, in nats, with return_entropy or entropy_coef; else None.
    kl: leading shape, the chosen estimator of KL(pi || pi_ref) without the ratio; None without a reference.
    stats: sums, counts and extremes that merge over micro-batches and ranks.
    """

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    stats: LossStats


def make_output(args: LossArguments, losses: Tensor, tokens: Tensor) -> RepoLossOutput:
    """Aggregate the (N,) weighted losses and the (13, N) TOKENS of the rows."""
    leading, tokens = args.layout.leading, tokens.detach()
    by_name = dict(zip(TOKENS, tokens.unbind(0), strict=True))
    lam = args.rows.scalars[SCALARS.index("lam")]
    return RepoLossOutput(
        loss=losses.view(leading) if args.per_token_loss else row_sum(losses),
        logps=by_name["logp"].view(leading),
        entropy=by_name["entropy"].view(leading) if args.with_entropy else None,
        kl=by_name["kl"].view(leading) if args.has_reference else None,
        stats=collect_stats(tokens, args.layout.live, args.sequence_hinge, args.sequence_live, lam),
    )


def _check_inplace(inplace: bool, logits: Tensor) -> None:
    """ValueError where the logits cannot be overwritten by their gradient."""
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace must be a bool; got {describe(inplace)}")
    if not inplace:
        return
    if torch.compiler.is_compiling():
        raise ValueError("inplace=True overwrites its input and cannot be traced by torch.compile; use inplace=False")
    reach = 1  # elements covered by the dimensions of smaller stride
    for stride, size in sorted((st, n) for st, n in zip(logits.stride(), logits.shape, strict=True) if n > 1):
        if stride < reach:
            raise ValueError(f"logits must not overlap in memory with inplace=True; got strides {logits.stride()}")
        reach = stride * (size - 1) + reach


def repo_loss(
    logits: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor | None = None,
    *,
    costs: Tensor | None = None,
    cost_baselines: Tensor | None = None,
    mode: str = "rectified",
    lam: Scalar = 0.0,
    cost_limit: Scalar = 0.0,
    normalize: bool = False,
    ref_logps: Tensor | None = None,
    ref_logits: Tensor | None = None,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_weights: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    eps_low: Scalar = 0.2,
    eps_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
    beta: Scalar = 0.0,
    kl_estimator: str = "k3",
    kl_ratio: bool = True,
    entropy_coef: Scalar = 0.0,
    loss_agg_mode: str = "token-mean",
    max_length: float | None = None,
    divisor: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    return_entropy: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> RepoLossOutput:
    """Clipped policy loss with the rectified cost advantage, KL to a reference and entropy, from logits.

    Per live token (RePO, arXiv 2410.19933)::

        A   = A_R - lam * A_C            rectified: A_C = cost_advantages, or {C - d}^+ - cost_baselines
                                         split:     A_C * 1[C > d]          lagrangian: A_C
        rho = exp(clamp(log pi - old_logps, +-20))
        l   = w * ( is * -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) + beta * kappa - entropy_coef * H )

    Row t scores `token_ids[t]`; nothing is shifted. Dead rows (masked, or id -100) give 0 and gradient 0, and their
    values are never read. Scalars may be floats or 0-d tensors; tensors are not checked for range.

    Args:
        logits: (T, V) packed or (B, L, V); fp32, bf16, fp16 or fp64; any row stride, unit column stride.
        token_ids: leading shape, int64 or int32; -100 is ignored.
        old_logps: leading shape, fp32, log-probs in nats under the sampling policy; None: on-policy, rho = 1 with its
            gradient.
        reward_advantages, cost_advantages: leading shape, or (B,) per sequence; fp32.
        costs: (B,) or leading shape, the sequence cost C; always feeds the stats. A sequence is unsafe iff C > d.
        cost_baselines: as costs; subtracted from the hinge in mode "rectified" without cost_advantages.
        mode: "rectified", "split" (needs costs) or "lagrangian".
        lam, cost_limit: penalty weight >= 0; limit d (float, 0-d, (B,) or leading shape).
        normalize: divide the combined advantage by 1 + lam.
        ref_logps: leading shape, fp32, for kl_estimator k1, k2, k3. ref_logits: like logits, for "full".
        response_mask: leading shape, bool. cu_seqlens: (B+1,) int32, bounds of packed sequences; without it every
            packed row is a sequence of its own in the stats.
        is_weights: leading shape, fp32; multiplies the surrogate only.
        temperature, softcap: logits become softcap * tanh(logits / softcap) / temperature, reference logits too.
        dual_clip: c > 1; for A < 0 the surrogate is at most -c A.
        beta, kl_estimator, kl_ratio: weight and form of the KL; kl_ratio multiplies k1 and k3 by rho, with its gradient
            (ignored by k2 and full).
        entropy_coef, return_entropy: alpha, and whether to return the entropy when alpha is 0.
        loss_agg_mode: "token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum",
            "seq-mean-token-sum-norm" (needs max_length) or "none" (per-token loss). divisor: replaces the outer count.
        grad_scale: multiplies the gradient before it is rounded to the logits' dtype; the caller divides it out.
        inplace: write the gradient over the logits. One backward only; not under torch.compile.
        backend: None (by device: Triton on a GPU, C++ on the CPU, PyTorch for fp64), "triton", "cpu" or "eager".

    Returns:
        RepoLossOutput. With no live token the loss is 0.0 and the gradient zero.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, range or combination; the message names the argument.
        IndexError: a live id outside [0, V); the Triton backend, which does not wait for the
            device to look, gives NaN in that row instead.
        RuntimeError: a second backward with inplace=True; create_graph=True.
    """
    check_matrix("logits", logits)
    backend = choose_backend(backend, logits)
    _check_inplace(inplace, logits)
    if ref_logits is not None:
        check_tensor(
            "ref_logits", check_matrix("ref_logits", ref_logits), (tuple(logits.shape),), (logits.dtype,), logits
        )
        ref_logits = ref_logits.detach()
    args = make_arguments(
        logits,
        logits.shape[-1],
        token_ids,
        old_logps,
        reward_advantages,
        cost_advantages,
        ref_logits is not None,
        "ref_logits",
        costs=costs,
        cost_baselines=cost_baselines,
        mode=mode,
        lam=lam,
        cost_limit=cost_limit,
        normalize=normalize,
        ref_logps=ref_logps,
        response_mask=response_mask,
        cu_seqlens=cu_seqlens,
        is_weights=is_weights,
        temperature=temperature,
        softcap=softcap,
        eps_low=eps_low,
        eps_high=eps_high,
        dual_clip=dual_clip,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_ratio=kl_ratio,
        entropy_coef=entropy_coef,
        loss_agg_mode=loss_agg_mode,
        max_length=max_length,
        divisor=divisor,
        grad_scale=grad_scale,
        return_entropy=return_entropy,
    )
    rows, want_grad = args.rows, logits.requires_grad and torch.is_grad_enabled()
    if inplace and want_grad:
        # the detached alias shares the version counter, so that autograd sees the logits change
        losses, tokens = InplaceLoss.apply(logits, ref_logits, rows, logits.detach(), backend)
    else:
        losses, tokens, _ = fused_loss(
            logits,
            ref_logits,
            rows.ids,
            rows.values,
            rows.scalars,
            rows.code,
            rows.softcap,
            rows.entropy,
            want_grad,
            backend,
        )
    return make_output(args, losses, tokens)


def _linear_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """The checked reference of the full KL: hidden states, weight and bias, or None when there is none."""
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
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(f"ref_weight must have V = {weight.shape[0]} rows like weight; got {describe(ref_weight)}")
    return ref_hidden.detach(), ref_weight.detach(), None if ref_bias is None else ref_bias.detach()


def linear_repo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logps: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
    costs: Tensor | None = None,
    cost_baselines: Tensor | None = None,
    mode: str = "rectified",
    lam: Scalar = 0.0,
    cost_limit: Scalar = 0.0,
    normalize: bool = False,
    ref_logps: Tensor | None = None,
    response_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_weights: Tensor | None = None,
    temperature: Scalar = 1.0,
    softcap: float | None = None,
    eps_low: Scalar = 0.2,
    eps_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
    beta: Scalar = 0.0,
    kl_estimator: str = "k3",
    kl_ratio: bool = True,
    entropy_coef: Scalar = 0.0,
    loss_agg_mode: str = "token-mean",
    max_length: float | None = None,
    divisor: Scalar | None = None,
    grad_scale: Scalar = 1.0,
    return_entropy: bool = False,
    backend: str | None = None,
) -> RepoLossOutput:
    """repo_loss of logits = hidden @ weight^T + bias, which exist only one chunk of live tokens at a time.

    Differentiable in hidden, weight and bias; a frozen weight costs no dweight. The gradients of a summed loss are
    found with it, in fp32 sums (fp64 for fp64 hidden), which the backward scales in place: with retain_graph=True it
    copies them instead. Those of loss_agg_mode="none" form the logits again. grad_scale is divided out.

    On CUDA the GEMMs take hidden's dtype, a weight of another dtype being cast to it once per call, and return fp32
    where they can; elsewhere bf16 and fp16 compute in fp32, with an fp32 copy of the weight during the call. Autocast
    changes nothing. The host waits for the device once per call, for the number of live tokens.

    Args:
        hidden: (T, H) or (B, L, H); fp32, bf16, fp16 or fp64. weight: (V, H), bias: (V,), each of hidden's dtype, or
            fp32 for bf16 and fp16 hidden; each gradient has its tensor's dtype.
        ref_hidden, ref_weight, ref_bias: the reference's of kl_estimator "full", with the same leading shape and V;
            its own H and dtype.
        chunk_tokens: live tokens per chunk; None: even chunks of at most 64 MB of logits, the reference's included.
        The other arguments, the result and the errors are those of repo_loss.
    """
    check_head("", hidden, weight, bias)
    backend = choose_backend(backend, hidden)
    check_chunk_tokens(chunk_tokens)
    reference = _linear_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    args = make_arguments(
        hidden,
        weight.shape[0],
        token_ids,
        old_logps,
        reward_advantages,
        cost_advantages,
        reference is not None,
        "ref_hidden and ref_weight",
        costs=costs,
        cost_baselines=cost_baselines,
        mode=mode,
        lam=lam,
        cost_limit=cost_limit,
        normalize=normalize,
        ref_logps=ref_logps,
        response_mask=response_mask,
        cu_seqlens=cu_seqlens,
        is_weights=is_weights,
        temperature=temperature,
        softcap=softcap,
        eps_low=eps_low,
        eps_high=eps_high,
        dual_clip=dual_clip,
        beta=beta,
        kl_estimator=kl_estimator,
        kl_ratio=kl_ratio,
        entropy_coef=entropy_coef,
        loss_agg_mode=loss_agg_mode,
        max_length=max_length,
        divisor=divisor,
        grad_scale=grad_scale,
        return_entropy=return_entropy,
    )
    rows, ref_head = args.rows, reference or (None, None, None)
    losses, tokens, *_ = linear_loss(
        hidden,
        weight,
        bias,
        *ref_head,
        rows.ids,
        rows.values,
        rows.scalars,
        rows.code,
        rows.softcap,
        rows.entropy,
        gradients_wanted(hidden, weight, bias),
        args.per_token_loss,
        chunk_tokens,
        backend,
    )
    return make_output(args, losses, tokens)
