"""The checked arguments of the losses, laid out as vectors over live rows.

A row is live when it is unmasked and its token id is not -100. Values of dead rows are never gathered, so infinities
and NaN there cannot reach a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import aggregation
from .checks import (
    COST_MODES,
    ID_DTYPES,
    IGNORED_TOKEN,
    KL_ESTIMATORS,
    VALUE_DTYPES,
    Scalar,
    check_choice,
    check_cu_seqlens,
    check_ids,
    check_scalar,
    check_temperature,
    check_tensor,
    compute_dtype,
    describe,
)
from .terms import Coefficients, TokenInputs, combined_advantages, hinge

SCALARS = ("lam", "beta", "eps_low", "eps_high", "entropy_coef", "temperature", "grad_scale")


@dataclass(frozen=True)
class Layout:
    """Which rows are live and to which sequence each row belongs.

    leading: (T,) or (B, L). rows: (n,) int64 index of live rows. sequence: (N,) int64. Packed rows without cu_seqlens
    are sequences of one token each.
    """

    leading: tuple[int, ...]
    live: Tensor
    rows: Tensor
    sequence: Tensor
    sequences: int
    has_cu_seqlens: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes that an argument per token or per sequence may have."""
        if len(self.leading) == 2:
            return self.leading, self.leading[:1]
        return (self.leading, (self.sequences,)) if self.has_cu_seqlens else (self.leading,)

    def gather(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """(n,): the live rows of a per-token value, or each row's entry of a per-sequence one."""
        if tuple(value.shape) == self.leading:
            return value.reshape(-1)[self.rows].to(dtype)
        return value[self.sequence[self.rows]].to(dtype)


def make_layout(
    leading: tuple[int, ...], token_ids: Tensor, response_mask: Tensor | None, cu_seqlens: Tensor | None, like: Tensor
) -> Layout:
    """Check ids, mask and cu_seqlens against the leading shape of the logits and find the live rows."""
    check_tensor("token_ids", token_ids, (leading,), ID_DTYPES, like)
    live = token_ids.reshape(-1) != IGNORED_TOKEN
    if response_mask is not None:
        live = live & check_tensor("response_mask", response_mask, (leading,), (torch.bool,), like).reshape(-1)
    count = live.numel()
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
    rows = live.nonzero().squeeze(1)
    return Layout(leading, live, rows, sequence, sequences, cu_seqlens is not None)


@dataclass(frozen=True)
class LossArguments:
    """The checked tail of repo_loss and linear_repo_loss, laid out per live row (n) and per sequence (S)."""

    layout: Layout
    ids: Tensor
    inputs: TokenInputs
    coef: Coefficients
    sequence_hinge: Tensor
    sequence_live: Tensor
    dtype: torch.dtype
    softcap: float | None
    kl_estimator: str
    kl_ratio: bool
    loss_agg_mode: str
    with_entropy: bool


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
    leading = tuple(source.shape[:-1])
    layout = make_layout(leading, token_ids, options["response_mask"], options["cu_seqlens"], source)
    _check_scalars(options)
    _check_aggregation(options, layout)
    _check_costs(options)
    _check_reference(options, has_full_reference, full_name)
    dtype = compute_dtype(source)

    def scalar(value: Scalar) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=source.device).detach()

    def rows(name: str, value: Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> Tensor | None:
        if value is None:
            return None
        return layout.gather(check_tensor(name, value, shapes, VALUE_DTYPES, source), dtype).detach()

    dual_clip = options["dual_clip"]
    coef = Coefficients(
        **{name: scalar(options[name]) for name in SCALARS},
        dual_clip=None if dual_clip is None else scalar(dual_clip),
    )
    per_token, either = (leading,), layout.shapes
    n = layout.rows.numel()
    costs = rows("costs", options["costs"], either)
    limit = options["cost_limit"]
    if isinstance(limit, Tensor) and limit.ndim:
        limit = rows("cost_limit", limit, either)
    else:
        check_scalar("cost_limit", limit, lambda x: True, "finite")
        # rounded as the costs are, so that C = d is safe for fp32 costs among fp64 logits too
        limit = scalar(limit).to(torch.float32 if options["costs"] is None else options["costs"].dtype).to(dtype)
    row_hinge = torch.zeros(n, dtype=dtype, device=source.device) if costs is None else hinge(costs, limit)
    unsafe = torch.zeros(n, dtype=torch.bool, device=source.device) if costs is None else costs > limit
    reward_rows = rows("reward_advantages", reward_advantages, either)
    if reward_rows is None:
        raise TypeError("reward_advantages must be a tensor; got None")
    cost_rows = rows("cost_advantages", cost_advantages, either)
    baselines = rows("cost_baselines", options["cost_baselines"], either)
    if cost_rows is None and costs is not None and options["mode"] == "rectified":
        cost_rows = row_hinge if baselines is None else row_hinge - baselines
    divisor = options["divisor"]
    weights = aggregation.token_weights(
        options["loss_agg_mode"],
        layout.live,
        layout.sequence,
        layout.sequences,
        dtype,
        None if divisor is None else scalar(divisor),
        options["max_length"],
    )
    inputs = TokenInputs(
        advantages=combined_advantages(reward_rows, cost_rows, unsafe, coef.lam, options["mode"], options["normalize"]),
        weights=weights[layout.rows],
        unsafe=unsafe,
        old_logps=rows("old_logps", old_logps, per_token),
        ref_logps=rows("ref_logps", options["ref_logps"], per_token),
        is_weights=rows("is_weights", options["is_weights"], per_token),
    )
    counts = aggregation.sequence_counts(layout.live, layout.sequence, layout.sequences)
    sequence_hinge = torch.zeros(layout.sequences, dtype=dtype, device=source.device)
    sequence_hinge = sequence_hinge.scatter_reduce(0, layout.sequence[layout.rows], row_hinge, "amax")
    entropy_coef = options["entropy_coef"]
    return LossArguments(
        layout=layout,
        ids=check_ids(token_ids, layout.rows, vocabulary),
        inputs=inputs,
        coef=coef,
        sequence_hinge=sequence_hinge,
        sequence_live=counts > 0,
        dtype=dtype,
        softcap=options["softcap"],
        kl_estimator=options["kl_estimator"],
        kl_ratio=options["kl_ratio"],
        loss_agg_mode=options["loss_agg_mode"],
        with_entropy=options["return_entropy"] or isinstance(entropy_coef, Tensor) or entropy_coef != 0,
    )
