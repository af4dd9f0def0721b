"""The checked arguments of the losses, laid out flat as the backends take them.

A row is live when it is unmasked and its token id is not -100. Dead rows get the id -100, and no backend reads their
values, so infinities and NaN there cannot reach a result. Nothing here looks at a tensor's values on a device, and no
shape depends on them: no host sync, and a graph of torch.compile stays whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    COST_MODES,
    ID_DTYPES,
    KL_ESTIMATORS,
    VALUE_DTYPES,
    Scalar,
    check_choice,
    check_cu_seqlens,
    check_scalar,
    check_temperature,
    check_tensor,
    compute_dtype,
    describe,
)
from . import aggregation


@dataclass(frozen=True)
class Layout:
    """Which rows are live and to which sequence each row belongs.

    leading: (T,) or (B, L). ids: (N,) int64, -100 on dead rows. live: (N,) bool. sequence: (N,) int64. Packed rows
    without cu_seqlens are sequences of one token each.
    """

    leading: tuple[int, ...]
    ids: Tensor
    live: Tensor
    sequence: Tensor
    sequences: int
    has_cu_seqlens: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that an argument per token or per sequence may have."""
        if len(self.leading) == 2:
            return self.leading, self.leading[:1]
        return (self.leading, (self.sequences,)) if self.has_cu_seqlens else (self.leading,)

    def spread(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,): a per-token value, or each row's entry of a per-sequence one."""
        if tuple(value.shape) == self.leading:
            return value.reshape(-1).to(dtype)
        return value.to(dtype)[self.sequence]


def make_layout(
    leading: tuple[int, ...], token_ids: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None, like: Tensor
) -> Layout:
    """Check ids, mask and cu_seqlens against the leading shape of the logits and find the live rows."""
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
    """The checked tail of repo_loss and linear_repo_loss.

    sequence_hinge: (S,) {C - d}^+ of each sequence. sequence_live: (S,) bool, has a live token. with_entropy: whether
    the entropy is returned. has_reference: whether the KL is.
    """

    layout: Layout
    rows: LossRows
    sequence_hinge: Tensor
    sequence_live: Tensor
    per_token_loss: bool
    with_entropy: bool
    has_reference: bool


def _check_scalars(options: dict[str, Any]) -> None:
    for name in ("lam", "beta", "eps_low", "eps_high"):
        check_scalar(name, options[name], lambda x: x >= 0, ">= 0")
    if not isinstance(options["eps_low"], Tensor) and options["eps_low"] > 1:
        raise ValueError(f"eps_low must be in [0, 1]; got {options['eps_low']!r}")
    check_scalar("entropy_coef", options["entropy_coef"], lambda x: True, "finite")
    check_scalar("grad_scale", options["grad_scale"], lambda x: x > 0, "> 0")
    if options["dual_clip"] is not None:
        check_scalar("dual_clip", options["dual_clip"], lambda x: x > 1, "> 1 or None")
    check_temperature(options["temperature"], options["softcap"])
    for name in ("normalize", "kl_ratio", "return_entropy"):
        if not isinstance(options[name], bool):
            raise TypeError(f"{name} must be a bool; got {describe(options[name])}")


def _check_aggregation(options: dict[str, Any], layout: Layout) -> None:
    mode, divisor, max_length = options["loss_agg_mode"], options["divisor"], options["max_length"]
    check_choice("loss_agg_mode", mode, aggregation.MODES)
    if divisor is not None:
        if mode in aggregation.MODES_WITHOUT_COUNT:
            raise ValueError(
                f"divisor must be None with loss_agg_mode={mode!r}, which divides by nothing; got {divisor!r}"
            )
        check_scalar("divisor", divisor, lambda x: x > 0, "> 0 or None")
    if mode == "seq-mean-token-sum-norm":
        if max_length is None or isinstance(max_length, Tensor):
            raise ValueError(f"max_length must be a number > 0 for {mode!r}; got {describe(max_length)}")
        check_scalar("max_length", max_length, lambda x: x > 0, "> 0")
    elif max_length is not None:
        raise ValueError(f"max_length is for loss_agg_mode='seq-mean-token-sum-norm' only; got mode {mode!r}")
    if mode in aggregation.SEQUENCE_MODES and len(layout.leading) == 1 and not layout.has_cu_seqlens:
        raise ValueError(f"loss_agg_mode={mode!r} on packed rows needs cu_seqlens; got None")


def _check_costs(options: dict[str, Any]) -> None:
    mode = options["mode"]
    check_choice("mode", mode, COST_MODES)
    has_costs, has_advantages = options["costs"] is not None, options["cost_advantages"] is not None
    if mode == "split" and not has_costs:
        raise ValueError("costs is required with mode='split', which gates the cost advantage by 1[C > d]; got None")
    if options["cost_baselines"] is not None and (mode != "rectified" or has_advantages or not has_costs):
        raise ValueError(
            "cost_baselines is for mode='rectified' with costs and without cost_advantages; got "
            f"mode={mode!r}, costs={'given' if has_costs else None}, "
            f"cost_advantages={'given' if has_advantages else None}"
        )
    limit, lam = options["cost_limit"], options["lam"]
    if not has_costs and (isinstance(limit, Tensor) or limit != 0):
        raise ValueError(f"cost_limit is read with costs only; got cost_limit={describe(limit)} and costs=None")
    penalises = isinstance(lam, Tensor) or lam > 0
    if penalises and not (has_advantages or (mode == "rectified" and has_costs)):
        takes = "cost_advantages or costs" if mode == "rectified" else "cost_advantages"
        raise ValueError(f"lam > 0 (or a tensor) with mode={mode!r} needs {takes}; got lam={lam!r} without")


def _check_reference(options: dict[str, Any], has_full_reference: bool, full_name: str) -> None:
    estimator, beta = options["kl_estimator"], options["beta"]
    check_choice("kl_estimator", estimator, KL_ESTIMATORS)
    has_logps = options["ref_logps"] is not None
    if estimator == "full":
        if has_logps:
            raise ValueError(f"ref_logps is not read with kl_estimator='full', which takes {full_name}; leave it None")
    elif has_full_reference:
        raise ValueError(f"{full_name} is for kl_estimator='full'; got {estimator!r}, which takes ref_logps")
    penalises = isinstance(beta, Tensor) or beta > 0
    if penalises and not (has_full_reference if estimator == "full" else has_logps):
        needed = full_name if estimator == "full" else "ref_logps"
        raise ValueError(f"beta > 0 (or a tensor) with kl_estimator={estimator!r} needs {needed}; got none")
    if estimator == "k1" and not options["kl_ratio"]:
        raise ValueError(
            "kl_estimator='k1' needs kl_ratio=True (its gradient is zero in expectation without); got False"
        )


def make_arguments(
    source: Tensor,
    vocabulary: int,
    token_ids: Tensor,
    old_logps: Tensor | None,
    reward_advantages: Tensor,
    cost_advantages: Tensor | None,
    has_full_reference: bool,
    full_name: str,
    **options: Any,
) -> LossArguments:
    """Check all but the logits or hidden states; `source` is one of those and gives leading shape, dtype, device."""
    options["cost_advantages"] = cost_advantages
    layout = make_layout(tuple(source.shape[:-1]), token_ids, options["response_mask"], options["cu_seqlens"], source)
    _check_scalars(options)
    _check_aggregation(options, layout)
    _check_costs(options)
    _check_reference(options, has_full_reference, full_name)
    dtype = compute_dtype(source)
    values = _values(source, layout, old_logps, reward_advantages, options)
    has_reference = has_full_reference or options["ref_logps"] is not None
    code = Code(
        cost=_cost_code(options),
        kl=KL_NAMES.index(options["kl_estimator"]) if has_reference else KL_NONE,
        kl_ratio=options["kl_ratio"],
        normalize=options["normalize"],
        on_policy=old_logps is None,
    )
    entropy_coef = options["entropy_coef"]
    with_gradient = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    with_entropy = with_gradient or options["return_entropy"]
    rows = LossRows(
        ids=layout.ids,
        values=values,
        scalars=scalar_vector(source, **{name: options[name] for name in SCALARS}),
        code=code.pack(),
        softcap=float(options["softcap"] or 0.0),
        entropy=ENTROPY_GRADIENT if with_gradient else ENTROPY_VALUE if with_entropy else ENTROPY_NONE,
    )
    counts = aggregation.sequence_counts(layout.live, layout.sequence, layout.sequences)
    row_hinge = hinge(values[VALUES.index("costs")], values[VALUES.index("cost_limits")])
    sequence_hinge = torch.zeros(layout.sequences, dtype=dtype, device=source.device).scatter_reduce(
        0, layout.sequence, torch.where(layout.live, row_hinge, 0.0), "amax"
    )
    return LossArguments(
        layout=layout,
        rows=rows,
        sequence_hinge=sequence_hinge,
        sequence_live=counts > 0,
        per_token_loss=options["loss_agg_mode"] == "none",
        with_entropy=with_entropy,
        has_reference=has_reference,
    )


def scalar_vector(source: Tensor, **scalars: Scalar | None) -> Tensor:
    """(8,) by SCALARS on source's device, from floats and 0-d tensors, without a host sync; 1 where not given.

    A dual_clip of None is inf, which never binds.
    """
    given = {name: value for name, value in scalars.items() if value is not None}
    vector = list((dict.fromkeys(SCALARS, 1.0) | {"dual_clip": math.inf} | given).values())
    dtype, device = compute_dtype(source), source.device
    if device.type == "cpu" and not any(isinstance(value, Tensor) for value in vector):
        return torch.tensor(vector, dtype=dtype, device=device)
    return torch.stack([device_scalar(value, dtype, device) for value in vector])


def _cost_code(options: dict[str, Any]) -> int:
    if options["cost_advantages"] is not None:
        return COST_GATED if options["mode"] == "split" else COST_GIVEN
    return COST_HINGE if options["mode"] == "rectified" and options["costs"] is not None else COST_NONE


def _values(
    source: Tensor, layout: Layout, old_logps: Tensor | None, reward_advantages: Tensor, options: dict[str, Any]
) -> Tensor:
    """The (9, N) matrix of rows.VALUES; absent values are those that change nothing."""
    dtype, count = compute_dtype(source), layout.ids.numel()

    def rows(name: str, value: Tensor | None, shapes: tuple[tuple[int, ...], ...], absent: float = 0.0) -> Tensor:
        if value is None:
            return torch.full((count,), absent, dtype=dtype, device=source.device)
        return layout.spread(check_tensor(name, value, shapes, VALUE_DTYPES, source), dtype).detach()

    if reward_advantages is None:
        raise TypeError("reward_advantages must be a tensor; got None")
    per_token, either = (layout.leading,), layout.shapes
    costs, limit = rows("costs", options["costs"], either, absent=-math.inf), options["cost_limit"]
    if isinstance(limit, Tensor) and limit.ndim:
        limits = rows("cost_limit", limit, either)
    else:
        check_scalar("cost_limit", limit, lambda x: True, "finite")
        # rounded as the costs are, so that C = d is safe for fp32 costs among fp64 logits too
        rounding = torch.float32 if options["costs"] is None else options["costs"].dtype
        limits = device_scalar(limit, dtype, source.device).to(rounding).to(dtype).expand(count)
    weights = aggregation.token_weights(
        options["loss_agg_mode"],
        layout.live,
        layout.sequence,
        layout.sequences,
        dtype,
        options["divisor"],
        options["max_length"],
    )
    by_name = {
        "reward_advantages": rows("reward_advantages", reward_advantages, either),
        "cost_advantages": rows("cost_advantages", options["cost_advantages"], either),
        "costs": costs,
        "cost_limits": limits,
        "cost_baselines": rows("cost_baselines", options["cost_baselines"], either),
        "old_logps": rows("old_logps", old_logps, per_token),
        "ref_logps": rows("ref_logps", options["ref_logps"], per_token),
        "is_weights": rows("is_weights", options["is_weights"], per_token, absent=1.0),
        "weights": weights,
    }
    return torch.stack([by_name[name] for name in VALUES])
