"""Check the arguments of a call and lay them out by row, as the backends take them.

A row is live when it is unmasked and its token id is not -100. Dead rows get the id -100 and no backend reads their
values, so that infinities and NaN there reach no result. Nothing here reads a value of a tensor on a device, and no
shape depends on one: the host does not wait, and torch.compile gets one graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.eager.terms import hinge
from ..backends.interface import (
    COST_GATED,
    COST_GIVEN,
    COST_HINGE,
    COST_NONE,
    ENTROPY_GRADIENT,
    ENTROPY_NONE,
    ENTROPY_VALUE,
    IGNORED,
    KL_NAMES,
    KL_NONE,
    SCALARS,
    VALUES,
    Code,
    LossRows,
    device_scalar,
)
from ..checks import (
    ID_DTYPES,
    VALUE_DTYPES,
    Scalar,
    check_cu_seqlens,
    check_scalar,
    check_tensor,
    compute_dtype,
    describe,
)
from . import aggregation
from .inputs import LossInputs
from .options import LossOptions


@dataclass(frozen=True)
class Layout:
    """Which rows are live, and to which sequence each row belongs.

    Args:
        leading: (T,) or (B, L).
        ids: (N,) int64, -100 on dead rows.
        live: (N,) bool.
        sequence: (N,) int64. Packed rows without cu_seqlens are sequences of one token each.
        sequences: their number.
        has_cu_seqlens: whether the bounds were given.
    """

    leading: tuple[int, ...]
    ids: Tensor
    live: Tensor
    sequence: Tensor
    sequences: int
    has_cu_seqlens: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that an argument with a value per token or per sequence may have."""
        if len(self.leading) == 2:
            return self.leading, self.leading[:1]
        return (self.leading, (self.sequences,)) if self.has_cu_seqlens else (self.leading,)

    def spread(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (N,): the values of a per-token tensor, or for each row the entry of its sequence."""
        if tuple(value.shape) == self.leading:
            return value.reshape(-1).to(dtype)
        return value.to(dtype)[self.sequence]


def make_layout(
    leading: tuple[int, ...], token_ids: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None, like: Tensor
) -> Layout:
    """Check ids, mask and bounds against the leading shape and the device of the logits, and find the live rows."""
    check_tensor("token_ids", token_ids, (leading,), ID_DTYPES, like)
    ids = token_ids.reshape(-1).to(torch.int64)
    if response_mask is not None:
        mask = check_tensor("response_mask", response_mask, (leading,), (torch.bool,), like).reshape(-1)
        ids = torch.where(mask, ids, IGNORED)
    count = ids.numel()
    index = torch.arange(count, device=like.device)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, leading, like)
        sequences = cu_seqlens.numel() - 1
        sequence = torch.bucketize(index, cu_seqlens[1:].to(torch.int64), right=True)
    elif len(leading) == 2:
        sequences = leading[0]
        sequence = index // max(leading[1], 1)
    else:
        sequences, sequence = count, index
    return Layout(leading, ids, ids != IGNORED, sequence, sequences, cu_seqlens is not None)


@dataclass(frozen=True)
class LossArguments:
    """The checked arguments of a loss, but for its logits or hidden states.

    Args:
        layout: live rows and sequences.
        rows: what the backend takes.
        sequence_hinge: (S,), {C - d}^+ of each sequence.
        sequence_live: (S,) bool, which sequences have a live token.
        per_token_loss: return the loss of each token, not a sum.
        with_entropy: return the entropy.
        has_reference: return the KL.
    """

    layout: Layout
    rows: LossRows
    sequence_hinge: Tensor
    sequence_live: Tensor
    per_token_loss: bool
    with_entropy: bool
    has_reference: bool


def make_arguments(
    source: Tensor, options: LossOptions, inputs: LossInputs, has_full_reference: bool, full_name: str
) -> LossArguments:
    """Check the inputs, also against the options, and lay them out by row.

    Args:
        source: logits or hidden states, which have been checked; they give leading shape, compute dtype and device.
        options: checked when they were made.
        inputs: all but the logits or hidden states.
        has_full_reference: whether reference logits or hidden states were given.
        full_name: how messages call those.
    """
    layout = make_layout(tuple(source.shape[:-1]), inputs.token_ids, inputs.response_mask, inputs.cu_seqlens, source)
    check_scalar("lam", inputs.lam, lambda x: x >= 0, ">= 0")
    check_scalar("beta", inputs.beta, lambda x: x >= 0, ">= 0")
    check_scalar("grad_scale", inputs.grad_scale, lambda x: x > 0, "> 0")
    _check_aggregation(options.loss_agg_mode, inputs.divisor, layout)
    _check_costs(options.cost_mode, inputs)
    _check_reference(options.kl_estimator, inputs, has_full_reference, full_name)
    values = _values(source, layout, options, inputs)
    has_reference = has_full_reference or inputs.ref_logps is not None
    code = Code(
        cost=_cost_code(options.cost_mode, inputs),
        kl=KL_NAMES.index(options.kl_estimator) if has_reference else KL_NONE,
        kl_importance_weighted=options.kl_importance_weighted,
        normalize=options.normalize,
        on_policy=inputs.old_logps is None,
    )
    entropy_coef = options.entropy_coef
    with_gradient = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    with_entropy = with_gradient or options.return_entropy
    rows = LossRows(
        ids=layout.ids,
        values=values,
        scalars=scalar_vector(
            source,
            lam=inputs.lam,
            beta=inputs.beta,
            eps_low=options.eps_low,
            eps_high=options.eps_high,
            entropy_coef=entropy_coef,
            temperature=options.temperature,
            grad_scale=inputs.grad_scale,
            dual_clip=options.dual_clip,
        ),
        code=code.pack(),
        softcap=float(options.softcap or 0.0),
        entropy=ENTROPY_GRADIENT if with_gradient else ENTROPY_VALUE if with_entropy else ENTROPY_NONE,
    )
    counts = aggregation.sequence_counts(layout.live, layout.sequence, layout.sequences)
    row_hinge = hinge(values[VALUES.index("costs")], values[VALUES.index("cost_limits")])
    sequence_hinge = torch.zeros(layout.sequences, dtype=compute_dtype(source), device=source.device).scatter_reduce(
        0, layout.sequence, torch.where(layout.live, row_hinge, 0.0), "amax"
    )
    return LossArguments(
        layout=layout,
        rows=rows,
        sequence_hinge=sequence_hinge,
        sequence_live=counts > 0,
        per_token_loss=options.loss_agg_mode == "none",
        with_entropy=with_entropy,
        has_reference=has_reference,
    )


def _check_aggregation(mode: str, divisor: Scalar | None, layout: Layout) -> None:
    if divisor is not None:
        if mode in aggregation.MODES_WITHOUT_COUNT:
            raise ValueError(
                f"divisor must be None with loss_agg_mode={mode!r}, which divides by nothing; got {divisor!r}"
            )
        check_scalar("divisor", divisor, lambda x: x > 0, "> 0 or None")
    if mode in aggregation.SEQUENCE_MODES and len(layout.leading) == 1 and not layout.has_cu_seqlens:
        raise ValueError(f"loss_agg_mode={mode!r} on packed rows needs cu_seqlens; got None")


def _check_costs(mode: str, inputs: LossInputs) -> None:
    has_costs, has_advantages = inputs.costs is not None, inputs.cost_advantages is not None
    if mode == "split" and not has_costs:
        raise ValueError(
            "costs is required with cost_mode='split', which gates the cost advantage by 1[C > d]; got None"
        )
    if inputs.cost_baselines is not None and (mode != "rectified" or has_advantages or not has_costs):
        raise ValueError(
            "cost_baselines is for cost_mode='rectified' with costs and without cost_advantages; got "
            f"cost_mode={mode!r}, costs={'given' if has_costs else None}, "
            f"cost_advantages={'given' if has_advantages else None}"
        )
    limit, lam = inputs.cost_limit, inputs.lam
    if not has_costs and (isinstance(limit, Tensor) or limit != 0):
        raise ValueError(f"cost_limit is read with costs only; got cost_limit={describe(limit)} and costs=None")
    penalises = isinstance(lam, Tensor) or lam > 0
    if penalises and not (has_advantages or (mode == "rectified" and has_costs)):
        takes = "cost_advantages or costs" if mode == "rectified" else "cost_advantages"
        raise ValueError(f"lam > 0 (or a tensor) with cost_mode={mode!r} needs {takes}; got lam={lam!r} without")


def _check_reference(estimator: str, inputs: LossInputs, has_full_reference: bool, full_name: str) -> None:
    has_logps, beta = inputs.ref_logps is not None, inputs.beta
    if estimator == "full":
        if has_logps:
            raise ValueError(f"ref_logps is not read with kl_estimator='full', which takes {full_name}; leave it None")
    elif has_full_reference:
        raise ValueError(f"{full_name} is for kl_estimator='full'; got {estimator!r}, which takes ref_logps")
    penalises = isinstance(beta, Tensor) or beta > 0
    if penalises and not (has_full_reference if estimator == "full" else has_logps):
        needed = full_name if estimator == "full" else "ref_logps"
        raise ValueError(f"beta > 0 (or a tensor) with kl_estimator={estimator!r} needs {needed}; got none")


def scalar_vector(source: Tensor, **scalars: Scalar | None) -> Tensor:
    """Collect floats and 0-d tensors into a vector (8,) by SCALARS on the source's device, without waiting for it.

    A scalar that is not given is 1. dual_clip None becomes inf, which never binds.
    """
    given = {name: value for name, value in scalars.items() if value is not None}
    vector = list((dict.fromkeys(SCALARS, 1.0) | {"dual_clip": math.inf} | given).values())
    dtype, device = compute_dtype(source), source.device
    if device.type == "cpu" and not any(isinstance(value, Tensor) for value in vector):
        return torch.tensor(vector, dtype=dtype, device=device)
    return torch.stack([device_scalar(value, dtype, device) for value in vector])


def _cost_code(mode: str, inputs: LossInputs) -> int:
    if inputs.cost_advantages is not None:
        return COST_GATED if mode == "split" else COST_GIVEN
    return COST_HINGE if mode == "rectified" and inputs.costs is not None else COST_NONE


def _values(source: Tensor, layout: Layout, options: LossOptions, inputs: LossInputs) -> Tensor:
    """Fill the matrix (9, N) of VALUES; an absent argument is filled with what changes nothing."""
    dtype, count = compute_dtype(source), layout.ids.numel()

    def rows(name: str, value: Tensor | None, shapes: tuple[tuple[int, ...], ...], absent: float = 0.0) -> Tensor:
        if value is None:
            return torch.full((count,), absent, dtype=dtype, device=source.device)
        return layout.spread(check_tensor(name, value, shapes, VALUE_DTYPES, source), dtype).detach()

    if inputs.reward_advantages is None:
        raise TypeError("reward_advantages must be a tensor; got None")
    per_token, either = (layout.leading,), layout.shapes
    costs, limit = rows("costs", inputs.costs, either, absent=-math.inf), inputs.cost_limit
    if isinstance(limit, Tensor) and limit.ndim:
        limits = rows("cost_limit", limit, either)
    else:
        check_scalar("cost_limit", limit, lambda x: True, "finite")
        # rounded as the costs are, so that C = d is safe also for fp32 costs with fp64 logits
        rounding = torch.float32 if inputs.costs is None else inputs.costs.dtype
        limits = device_scalar(limit, dtype, source.device).to(rounding).to(dtype).expand(count)
    weights = aggregation.token_weights(
        options.loss_agg_mode,
        layout.live,
        layout.sequence,
        layout.sequences,
        dtype,
        inputs.divisor,
        options.max_length,
    )
    by_name = {
        "reward_advantages": rows("reward_advantages", inputs.reward_advantages, either),
        "cost_advantages": rows("cost_advantages", inputs.cost_advantages, either),
        "costs": costs,
        "cost_limits": limits,
        "cost_baselines": rows("cost_baselines", inputs.cost_baselines, either),
        "old_logps": rows("old_logps", inputs.old_logps, per_token),
        "ref_logps": rows("ref_logps", inputs.ref_logps, per_token),
        "importance_weights": rows("importance_weights", inputs.importance_weights, per_token, absent=1.0),
        "weights": weights,
    }
    return torch.stack([by_name[name] for name in VALUES])
