"""Whole operations in plain PyTorch: oracle of the other backends and their fallback, in any dtype including fp64.

Structure as in the kernels: row statistics -> token terms -> apply. Rows are taken in chunks of bounded memory, live
rows only; a row's result does not depend on the rows around it. Ids are checked, which syncs a GPU: this is the
reference, not the fast path.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .arguments import LossArguments
from .stats import LossStats, collect_stats
from .terms import TokenTerms, token_terms

CHUNK_ELEMENTS = 1 << 23  # 32 MB of fp32 logits


def chunks(rows: int, columns: int, chunk_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive row chunks; at least one row each."""
    size = chunk_rows or max(1, CHUNK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def row_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension of (n, V), each row's bits independent of n.

    PyTorch splits the reduction over threads when there is a single output, which would change the rounding.
    """
    if values.shape[0] == 1:
        return values.expand(2, -1).sum(-1)[:1]
    return values.sum(-1)


@dataclass(frozen=True)
class Rows:
    """Log-probabilities of n rows over the vocabulary and what the chain rule needs to go back to the logits.

    log_probs: (n, V) of softcap(logits) / temperature. slope: (n, V) d softcap(z)/dz, None without a softcap.
    """

    log_probs: Tensor
    slope: Tensor | None

    @property
    def probs(self) -> Tensor:
        """(n, V)."""
        return self.log_probs.exp()


def make_rows(logits: Tensor, temperature: Tensor, softcap: float | None) -> Rows:
    """logits: (n, V) of the compute dtype.

    The maximum is subtracted before the division by the temperature: the difference is exact, the scaled value is not.
    The sum leaves the maximum out and enters through log1p, which keeps 1 - p_y when p_y -> 1.
    """
    slope = None
    if softcap is not None:
        # 1 - tanh(x)^2 = 4 e / (1 + e)^2 with e = exp(-2|x|), which does not cancel where the cap saturates
        decay = torch.exp(-2 * (logits / softcap).abs())
        slope = 4 * decay / (1 + decay) ** 2
        logits = softcap * torch.tanh(logits / softcap)
    top, where = logits.max(-1, keepdim=True)
    centred = (logits - top) / temperature
    rest = row_sum(centred.exp().scatter_(-1, where, 0.0))
    return Rows(centred - torch.log1p(rest)[:, None], slope)


def target_logps(rows: Rows, ids: Tensor) -> Tensor:
    """(n,) log-probability of each row's id."""
    return rows.log_probs.gather(-1, ids[:, None]).squeeze(-1)


def finite_log(log_probs: Tensor) -> Tensor:
    """-inf -> the lowest finite value, so that p log p is 0 and not NaN where p = 0."""
    return log_probs.clamp_min(torch.finfo(log_probs.dtype).min)


def row_entropy(rows: Rows) -> Tensor:
    """H = -sum_v p_v log p_v, (n,)."""
    return -row_sum(rows.probs * finite_log(rows.log_probs))


def log_prob_difference(rows: Rows, reference: Rows) -> Tensor:
    """log p_v - log q_v, (n, V); 0 where p_v = 0."""
    difference = rows.log_probs - reference.log_probs
    return torch.where(rows.probs == 0, torch.zeros_like(difference), difference)


def row_full_kl(rows: Rows, reference: Rows) -> Tensor:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), (n,)."""
    return row_sum(rows.probs * log_prob_difference(rows, reference))


def apply_rows(
    rows: Rows,
    ids: Tensor,
    temperature: Tensor,
    softcap: float | None,
    g_logp: Tensor,
    g_entropy: Tensor | None = None,
    entropy: Tensor | None = None,
    g_kl: Tensor | None = None,
    kl: Tensor | None = None,
    reference: Rows | None = None,
) -> Tensor:
    """dL/dlogits, (n, V), from the scalars per row (n,) of terms.py."""
    probs = rows.probs
    grad = -g_logp[:, None] * probs
    # d(log p_y)/dz_y = 1 - p_y, taken as -expm1(log p_y): no cancellation when p_y -> 1
    target = g_logp * -torch.expm1(target_logps(rows, ids))
    grad.scatter_(-1, ids[:, None], target[:, None])
    if g_entropy is not None and entropy is not None:
        # dH/dz_v = -p_v (log p_v + H)
        grad -= g_entropy[:, None] * probs * (finite_log(rows.log_probs) + entropy[:, None])
    if g_kl is not None and kl is not None and reference is not None:
        # dKL/dz_v = p_v (log p_v - log q_v - KL)
        grad += g_kl[:, None] * probs * (log_prob_difference(rows, reference) - kl[:, None])
    grad /= temperature
    if rows.slope is not None:
        grad *= rows.slope
    return grad


@dataclass(frozen=True)
class ChunkResult:
    """One chunk of live rows: its terms, per-token outputs and, when asked for, dL/dlogits (n, V) times grad_scale."""

    terms: TokenTerms
    logps: Tensor
    entropy: Tensor | None
    grad: Tensor | None


def loss_chunk(
    args: LossArguments, start: int, stop: int, logits: Tensor, ref_logits: Tensor | None, want_grad: bool
) -> ChunkResult:
    """Statistics -> terms -> apply for the live rows start..stop. logits, ref_logits: (stop - start, V)."""
    ids, temperature = args.ids[start:stop], args.coef.temperature
    rows = make_rows(logits, temperature, args.softcap)
    reference = None if ref_logits is None else make_rows(ref_logits, temperature, args.softcap)
    logps = target_logps(rows, ids)
    entropy = row_entropy(rows) if args.with_entropy else None
    kl = None if reference is None else row_full_kl(rows, reference)
    terms = token_terms(args.inputs.rows(start, stop), logps, entropy, kl, args.coef, args.kl_estimator, args.kl_ratio)
    grad = None
    if want_grad:
        scale = args.coef.grad_scale
        grad = apply_rows(
            rows,
            ids,
            temperature,
            args.softcap,
            terms.g_logp * scale,
            terms.g_entropy * scale,
            entropy,
            terms.g_kl * scale,
            kl,
            reference,
        )
    return ChunkResult(terms, logps, entropy, grad)


@dataclass(frozen=True)
class LossResult:
    """loss: 0-d, or the leading shape for "none". logps, entropy, kl: leading shape, 0 on dead rows, or None."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor | None
    kl: Tensor | None
    stats: LossStats


def spread(args: LossArguments, values: Tensor) -> Tensor:
    """(n,) of live rows -> the leading shape with zeros on dead rows."""
    out = torch.zeros(args.layout.live.numel(), dtype=values.dtype, device=values.device)
    out[args.layout.rows] = values
    return out.view(args.layout.leading)


def assemble(args: LossArguments, parts: list[ChunkResult], has_reference: bool) -> LossResult:
    """Outputs of one call from its chunks."""
    if not parts:
        parts = [_empty_chunk(args)]
    terms = TokenTerms.concatenate([p.terms for p in parts])
    logps = torch.cat([p.logps for p in parts])
    entropy = torch.cat([p.entropy for p in parts if p.entropy is not None]) if args.with_entropy else None
    stats = collect_stats(terms, entropy, args.inputs.unsafe, args.sequence_hinge, args.sequence_live, args.coef.lam)
    return LossResult(
        loss=spread(args, terms.loss) if args.loss_agg_mode == "none" else terms.loss.sum(),
        logps=spread(args, logps),
        entropy=None if entropy is None else spread(args, entropy),
        kl=spread(args, terms.kl) if has_reference else None,
        stats=stats,
    )


def _empty_chunk(args: LossArguments) -> ChunkResult:
    nothing = torch.zeros(0, dtype=args.dtype, device=args.ids.device)
    entropy = nothing if args.with_entropy else None
    terms = token_terms(args.inputs, nothing, entropy, None, args.coef, args.kl_estimator, args.kl_ratio)
    return ChunkResult(terms, nothing, entropy, None)


def take_rows(matrix: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of (T, V) or (B, L, V) by flat index, as (n, V) of dtype, without a copy of the whole."""
    if matrix.ndim == 2:
        return matrix[rows].to(dtype)
    length = matrix.shape[1]
    return matrix[rows // length, rows % length].to(dtype)


def put_rows(matrix: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write (n, V) into rows of (T, V) or (B, L, V) by flat index, rounding to the matrix's dtype."""
    if matrix.ndim == 2:
        matrix[rows] = values.to(matrix.dtype)
    else:
        matrix[rows // matrix.shape[1], rows % matrix.shape[1]] = values.to(matrix.dtype)


def repo_loss(args: LossArguments, logits: Tensor, ref_logits: Tensor | None, grad_out: Tensor | None) -> LossResult:
    """The loss; dL/dlogits times grad_scale goes into `grad_out`, which may be the logits themselves."""
    has_reference = ref_logits is not None or args.inputs.ref_logps is not None
    parts = []
    for start, stop in chunks(args.layout.rows.numel(), logits.shape[-1]):
        rows = args.layout.rows[start:stop]
        ref = None if ref_logits is None else take_rows(ref_logits, rows, args.dtype)
        part = loss_chunk(args, start, stop, take_rows(logits, rows, args.dtype), ref, grad_out is not None)
        if grad_out is not None and part.grad is not None:
            put_rows(grad_out, rows, part.grad)
        parts.append(ChunkResult(part.terms, part.logps, part.entropy, None))
    if grad_out is not None:
        dead = (~args.layout.live).nonzero().squeeze(1)
        put_rows(grad_out, dead, grad_out.new_zeros((dead.numel(), grad_out.shape[-1])))
    return assemble(args, parts, has_reference)


@dataclass(frozen=True)
class Head:
    """A linear head in the compute dtype: logits = hidden @ weight^T + bias. weight: (V, H); bias: (V,) or None."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, V)."""
        return F.linear(hidden, self.weight, self.bias)


def make_head(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    """A detached head in the compute dtype."""
    return Head(weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))


@dataclass
class HeadGradients:
    """Sums of dL/dhidden, dL/dweight, dL/dbias over chunks, in the compute dtype; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def zeros(hidden: Tensor, head: Head, wanted: tuple[bool, bool, bool], dtype: torch.dtype) -> HeadGradients:
        """Nothing summed yet."""
        return HeadGradients(
            torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if wanted[0] else None,
            torch.zeros_like(head.weight) if wanted[1] else None,
            torch.zeros_like(head.bias) if wanted[2] and head.bias is not None else None,
        )

    def add(self, rows: Tensor, grad: Tensor, hidden: Tensor, head: Head) -> None:
        """grad: (n, V) dL/dlogits of the rows; hidden: (n, H) of the compute dtype."""
        if self.hidden is not None:
            put_rows(self.hidden, rows, grad @ head.weight)
        if self.weight is not None:
            self.weight.addmm_(grad.t(), hidden)
        if self.bias is not None:
            self.bias += grad.sum(0)


def linear_repo_loss(
    args: LossArguments,
    hidden: Tensor,
    head: Head,
    ref_hidden: Tensor | None,
    ref_head: Head | None,
    gradients: HeadGradients | None,
    chunk_tokens: int | None,
    upstream: Tensor | None = None,
) -> LossResult:
    """The loss from hidden states; the logits exist one chunk at a time. Gradients are added to `gradients`.

    upstream: (n,) factor on each live row's gradient, for "none" losses.
    """
    has_reference = ref_hidden is not None or args.inputs.ref_logps is not None
    parts = []
    for start, stop in chunks(args.layout.rows.numel(), head.weight.shape[0], chunk_tokens):
        rows = args.layout.rows[start:stop]
        x = take_rows(hidden, rows, args.dtype)
        ref = None
        if ref_hidden is not None and ref_head is not None:
            ref = ref_head.logits(take_rows(ref_hidden, rows, args.dtype))
        part = loss_chunk(args, start, stop, head.logits(x), ref, gradients is not None)
        if gradients is not None and part.grad is not None:
            # grad_scale protects stored logits gradients from underflow; here nothing is stored, so it goes out again
            grad = part.grad / args.coef.grad_scale
            gradients.add(rows, grad if upstream is None else grad * upstream[start:stop, None], x, head)
        parts.append(ChunkResult(part.terms, part.logps, part.entropy, None))
    return assemble(args, parts, has_reference)
