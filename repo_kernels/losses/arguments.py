"""Check the arguments of a call and hand them to a backend as they are: nothing here touches a value on a device.

No shape depends on a value either: the host does not wait, and torch.compile gets one graph.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends.codes import (
    ABSENT_SCALARS,
    AGGREGATIONS,
    COST_GATED,
    COST_GIVEN,
    COST_HINGE,
    COST_NONE,
    ENTROPY_GRADIENT,
    ENTROPY_NONE,
    ENTROPY_VALUE,
    KL_NAMES,
    KL_NONE,
    SCALARS,
    Code,
)
from ..backends.interface import Loss, RowArguments, compute_dtype
from ..checks import (
    ID_DTYPES,
    LOGITS_DTYPES,
    VALUE_DTYPES,
    Scalar,
    check_cu_seqlens,
    check_mask,
    check_scalar,
    check_tensor,
    describe,
    is_column,
    number,
)
from ..tensor_kinds import check_kind, check_memory
from .inputs import LossInputs, TokenValues
from .options import MODES_WITHOUT_COUNT, SEQUENCE_MODES, LossOptions, TokenOptions
from .temperature import is_by_row, refuse_gradient

# Looked up once, so that torch.compile sees constants.
VALUE_NAMES = tuple(field.name for field in fields(TokenValues))
OPTION_NAMES = tuple(field.name for field in fields(TokenOptions))


def check_ids(token_ids: Tensor, leading: tuple[int, ...], like: Tensor) -> Tensor:
    """Check the token ids against the leading shape and the device of the logits; return them as int64."""
    ids = check_tensor("token_ids", token_ids, (leading,), ID_DTYPES, like)
    return ids if ids.dtype == torch.int64 else ids.to(torch.int64)


def make_logps_loss(logps: Tensor, options: TokenOptions, inputs: TokenValues) -> Loss:
    """Check the inputs of a loss from log-probabilities and describe it as one over a vocabulary of one token.

    logps: (T,) or (B, L), checked.
    """
    if options.kl_estimator == "full":
        raise ValueError("kl_estimator='full' needs the logits; repo_loss_from_logps takes 'k1', 'k2' or 'k3'")
    values = {name: getattr(inputs, name) for name in VALUE_NAMES}
    constant = {name: getattr(options, name) for name in OPTION_NAMES}
    ids = torch.zeros(logps.shape, dtype=torch.int64, device=logps.device)
    call = LossInputs(token_ids=ids, **values)
    return make_loss(logps[..., None], LossOptions(**constant), call, 1.0, False, "ref_logits")


def make_loss(
    source: Tensor,
    options: LossOptions,
    inputs: LossInputs,
    temperature: Scalar,
    has_full_reference: bool,
    full_name: str,
) -> Loss:
    """Check the inputs, also against the options, and describe the loss to a backend.

    Args:
        source: logits or hidden states, which have been checked; they give leading shape, compute dtype and device.
        options: checked when they were made.
        inputs: all but the logits or hidden states.
        temperature: of this call, in place of that of the options: a scalar, which has been checked, or one value per
            row or sequence.
        has_full_reference: whether reference logits or hidden states were given.
        full_name: how messages call those.
    """
    inputs = _plain_numbers(inputs)
    refuse_gradient(temperature)
    by_row = is_by_row(temperature)
    arguments = _arguments(source, inputs, temperature if by_row else None)
    check_scalar("lam", inputs.lam, lambda x: x >= 0, ">= 0")
    check_scalar("beta", inputs.beta, lambda x: x >= 0, ">= 0")
    check_scalar("grad_scale", inputs.grad_scale, lambda x: x > 0, "> 0")
    _check_aggregation(options.loss_agg_mode, inputs.divisor, arguments)
    _check_costs(options.cost_mode, inputs)
    _check_reference(options.kl_estimator, inputs, has_full_reference, full_name)
    has_reference = has_full_reference or inputs.ref_logps is not None
    code = Code(
        cost=_cost_code(options.cost_mode, inputs),
        kl=KL_NAMES.index(options.kl_estimator) if has_reference else KL_NONE,
        kl_importance_weighted=options.kl_importance_weighted,
        normalize=options.normalize,
        on_policy=inputs.old_logps is None,
        aggregation=AGGREGATIONS.index(options.loss_agg_mode),
        divisor=inputs.divisor is not None,
        cispo=options.surrogate == "cispo",
        sequence_ratio=options.ratio_level == "sequence",
    )
    entropy_coef = options.entropy_coef
    with_gradient = isinstance(entropy_coef, Tensor) or entropy_coef != 0
    entropy = ENTROPY_GRADIENT if with_gradient else ENTROPY_VALUE if options.return_entropy else ENTROPY_NONE
    limit = inputs.cost_limit
    scalars = _scalars(
        lam=inputs.lam,
        beta=inputs.beta,
        eps_low=options.eps_low,
        eps_high=options.eps_high,
        entropy_coef=entropy_coef,
        temperature=None if by_row else temperature,
        grad_scale=inputs.grad_scale,
        dual_clip=options.dual_clip,
        cost_limit=None if isinstance(limit, Tensor) and limit.ndim else limit,
        divisor=inputs.divisor,
        max_length=options.max_length,
    )
    for name, value in zip(SCALARS, scalars, strict=True):
        if isinstance(value, Tensor):
            check_kind(name, value, source)
    return Loss(arguments, scalars, code.pack(), float(options.softcap or 0.0), entropy)


def _plain_numbers(inputs: LossInputs) -> LossInputs:
    """Return the inputs with Python's numbers for numpy scalars."""
    names = ("lam", "beta", "grad_scale", "divisor", "cost_limit")
    changed: dict[str, Any] = {name: number(x) for name in names if isinstance(x := getattr(inputs, name), np.number)}
    return replace(inputs, **changed) if changed else inputs


def _arguments(source: Tensor, inputs: LossInputs, temperature: Any) -> RowArguments:
    """temperature: a tensor by row or sequence, or None."""
    leading, dtype = tuple(source.shape[:-1]), compute_dtype(source)
    ids, mask, bounds = check_ids(inputs.token_ids, leading, source), inputs.response_mask, inputs.cu_seqlens
    if mask is not None:
        mask = check_mask(mask, leading, source)
    if bounds is not None:
        check_cu_seqlens(bounds, leading, source)
        bounds = bounds if bounds.is_contiguous() else bounds.contiguous()
        either: tuple[tuple[int, ...], ...] = (leading, (bounds.shape[0] - 1,))
    else:
        either = (leading, leading[:1]) if len(leading) == 2 else (leading,)

    def values(
        name: str,
        value: Tensor | None,
        shapes: tuple[tuple[int, ...], ...],
        dtypes: tuple[torch.dtype, ...] = VALUE_DTYPES,
    ) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor) and is_column(value) and shapes is either and tuple(value.shape) not in shapes:
            value = value.squeeze(1)
            if bounds is not None and either[0] == either[1] == tuple(value.shape):  # (B,) would be read by token
                value = of_sequences(value, bounds)
        check_tensor(name, value, shapes, dtypes, source)
        if value.dtype != dtype and (dtype == torch.float32 or value.dtype not in VALUE_DTYPES):
            check_memory(**{name: value})  # which the conversion reads
            value = value.to(dtype)
        return value.detach() if value.requires_grad else value

    reward = values("reward_advantages", inputs.reward_advantages, either)
    if reward is None:
        raise TypeError("reward_advantages must be a tensor; got None")
    limit, limits = inputs.cost_limit, None
    if isinstance(limit, Tensor) and limit.ndim:
        limits = values("cost_limit", limit, either)
    else:
        check_scalar("cost_limit", limit, lambda x: True, "finite")
    return RowArguments(
        token_ids=ids,
        response_mask=mask,
        cu_seqlens=bounds,
        reward_advantages=reward,
        cost_advantages=values("cost_advantages", inputs.cost_advantages, either),
        costs=values("costs", inputs.costs, either),
        cost_limits=limits,
        cost_baselines=values("cost_baselines", inputs.cost_baselines, either),
        old_logps=values("old_logps", inputs.old_logps, (leading,)),
        ref_logps=values("ref_logps", inputs.ref_logps, (leading,)),
        importance_weights=values("importance_weights", inputs.importance_weights, (leading,)),
        temperatures=values("temperature", temperature, either, LOGITS_DTYPES),
    )


def of_sequences(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Repeat values (B,) over the tokens of each sequence of packed rows, (T,), where T = B; any value on dead rows."""
    rows = torch.arange(values.shape[0], dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    index = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    return values[index.clamp_max(values.shape[0] - 1)]


def _scalars(**given: Scalar | None) -> tuple[Scalar, ...]:
    """Return the scalars in the order of SCALARS; None stands for the absent value."""
    return tuple(absent if given[name] is None else given[name] for name, absent in ABSENT_SCALARS.items())  # type: ignore[misc]


def _check_aggregation(mode: str, divisor: Scalar | None, arguments: RowArguments) -> None:
    if divisor is not None:
        if mode in MODES_WITHOUT_COUNT:
            raise ValueError(
                f"divisor must be None with loss_agg_mode={mode!r}, which divides by nothing; got {divisor!r}"
            )
        check_scalar("divisor", divisor, lambda x: x > 0, "> 0 or None")
    if mode in SEQUENCE_MODES and len(arguments.leading) == 1 and arguments.cu_seqlens is None:
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
    # the value is looked at last: torch.compile would compile anew for lam = 0
    if not (has_advantages or (mode == "rectified" and has_costs)) and (isinstance(lam, Tensor) or lam > 0):
        takes = "cost_advantages or costs" if mode == "rectified" else "cost_advantages"
        raise ValueError(f"lam > 0 (or a tensor) with cost_mode={mode!r} needs {takes}; got lam={lam!r} without")


def _check_reference(estimator: str, inputs: LossInputs, has_full_reference: bool, full_name: str) -> None:
    has_logps, beta = inputs.ref_logps is not None, inputs.beta
    if estimator == "full":
        if has_logps:
            raise ValueError(f"ref_logps is not read with kl_estimator='full', which takes {full_name}; leave it None")
    elif has_full_reference:
        raise ValueError(f"{full_name} is for kl_estimator='full'; got {estimator!r}, which takes ref_logps")
    if not (has_full_reference if estimator == "full" else has_logps) and (isinstance(beta, Tensor) or beta > 0):
        needed = full_name if estimator == "full" else "ref_logps"
        raise ValueError(f"beta > 0 (or a tensor) with kl_estimator={estimator!r} needs {needed}; got none")


def _cost_code(mode: str, inputs: LossInputs) -> int:
    if inputs.cost_advantages is not None:
        return COST_GATED if mode == "split" else COST_GIVEN
    return COST_HINGE if mode == "rectified" and inputs.costs is not None else COST_NONE
