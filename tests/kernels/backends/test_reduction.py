"""Sums over the rows of a loss: any number and length of sequences, with bits that are the same every time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels.backends import choice
from repo_kernels.backends.codes import (
    ABSENT_SCALARS,
    CLIPPED_HIGH,
    CLIPPED_LOW,
    COST_NONE,
    IGNORED,
    KL_NONE,
    LIVE,
    ROWS,
    SEQ_TOKEN_MEAN,
    STATS,
    UNSAFE,
    Code,
)
from repo_kernels.backends.interface import Loss, RowArguments, RowResults
from tests.support.kernels.cases import row_arguments
from tests.support.kernels.oracle import sequences_of

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

# More sequences, and longer ones, than the Triton kernels take at a time.
LAYOUTS: dict[str, Any] = {
    "one long sequence": (1, 2600),
    "nine sequences": (9, 300),
    "forty sequences": (40, 70),
    "sequences of one token": (2100, 1),
    "packed": [0, 7, 1100, 0, 0, 33, 64, 1, 0],
    "many packed": [3, 0, 40, 1] * 12,
    "tokens": 2100,
}


def make_rows(layout: str, per_sequence: bool, dead: float = 0.3) -> tuple[Loss, RowResults, Tensor]:
    """A loss, results of its rows as `fused` may have left them, and the dead rows' places, (N,) bool."""
    g = torch.Generator().manual_seed(len(layout))
    shape, bounds = LAYOUTS[layout], None
    if isinstance(shape, list):
        bounds = torch.tensor([0, *shape]).cumsum(0).to(torch.int32)
    leading = (sum(shape),) if bounds is not None else shape if isinstance(shape, tuple) else (shape,)
    sequences, count = leading[0] if bounds is None else len(shape), math.prod(leading)
    gone = torch.rand(count, generator=g) < dead
    costs = torch.randn((sequences,) if per_sequence else leading, generator=g)
    arguments = row_arguments(
        torch.zeros(count, dtype=torch.int64).masked_fill(gone, IGNORED).view(leading),
        cu_seqlens=bounds,
        reward_advantages=torch.zeros(leading),
        costs=costs if per_sequence else costs.reshape(-1).masked_fill(gone, math.nan).view(leading),
        cost_limits=torch.randn(costs.shape, generator=g),
    )
    scalars = ABSENT_SCALARS | {"lam": 0.7}
    code = Code(COST_NONE, KL_NONE, False, False, on_policy=True, aggregation=SEQ_TOKEN_MEAN, divisor=False)
    loss = Loss(arguments, tuple(scalars.values()), code.pack(), 0.0, 0)
    flags = LIVE + torch.randint(0, 8, (count,), generator=g, dtype=torch.int32) * 2
    rows = torch.randn(len(ROWS), count, generator=g)
    return loss, RowResults(rows.masked_fill(gone, 0.0), flags.masked_fill(gone, 0)), gone


def exact_sums(loss: Loss, results: RowResults) -> tuple[float, list[float]]:
    """The loss and the statistics in float64, one sequence at a time."""
    arguments, rows = loss.arguments, results.rows.double()
    live, flags = results.flags != 0, results.flags
    ratio = rows[4].exp()[live]

    def count(bit: int, unsafe: bool | None = None) -> float:
        chosen = (flags & bit) != 0
        if unsafe is not None:
            chosen &= ((flags & UNSAFE) != 0) == unsafe
        return float(chosen.sum())

    hinges = []
    for s, members in enumerate(sequences_of(arguments.leading, arguments.cu_seqlens)):
        alive = [row for row in members if live[row]]
        if alive:
            hinges.append(max(hinge_of(arguments, s, row) for row in alive))
    sums = {
        "entropy_sum": rows[2][live].sum(),
        "kl_ref_sum": rows[3][live].sum(),
        "tokens": count(LIVE),
        "tokens_unsafe": count(UNSAFE),
        "clipped_low_safe": count(CLIPPED_LOW, False),
        "clipped_low_unsafe": count(CLIPPED_LOW, True),
        "clipped_high_safe": count(CLIPPED_HIGH, False),
        "clipped_high_unsafe": count(CLIPPED_HIGH, True),
        "ratio_sum": ratio.sum(),
        "ratio_square_sum": ratio.square().sum(),
        "kl_old_k1_sum": -rows[4][live].sum(),
        "kl_old_k3_sum": (rows[4].expm1() - rows[4])[live].sum(),
        "sequences": len(hinges),
        "sequences_unsafe": sum(hinge > 0 for hinge in hinges),
        "rectified_cost_sum": sum(hinges),
        "penalty_sum": 0.7 * sum(hinges),
        "ratio_min": ratio.min() if live.any() else 1.0,
        "ratio_max": ratio.max() if live.any() else 1.0,
    }
    return float(rows[0][live].sum()), [float(sums[name]) for name in STATS]


def hinge_of(arguments: RowArguments, sequence: int, row: int) -> float:
    """{C - d}^+ of a row."""
    cost, limit = (x.reshape(-1) for x in (arguments.costs, arguments.cost_limits))
    place = row if arguments.costs.shape == arguments.leading else sequence
    return max(float(cost[place] - limit[place]), 0.0)


def reduce(name: str, loss: Loss, results: RowResults) -> tuple[Tensor, Tensor]:
    kernels = choice.load(name)
    like = torch.zeros(*loss.arguments.leading, 3)
    return kernels.reduce(loss, kernels.prepare(like, loss), results)


@pytest.mark.parametrize("per_sequence", [True, False], ids=["per sequence", "per token"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_sums_are_those_of_float64(layout: str, per_sequence: bool, backend: str) -> None:
    loss, results, gone = make_rows(layout, per_sequence)
    assert gone.any()
    total, stats = reduce(backend, loss, results)
    exact, exact_stats = exact_sums(loss, results)
    size = results.rows[0].double().abs().sum().item()
    assert abs(total.item() - exact) <= 1e-6 * size
    for name, got, expected in zip(STATS, stats.tolist(), exact_stats, strict=True):
        # the sums of entropy, KL and log rho have terms of both signs here
        scale = size if name in ("entropy_sum", "kl_ref_sum", "kl_old_k1_sum") else abs(expected)
        assert abs(got - expected) <= 2e-6 * scale + 1e-6, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_have_the_same_bits_every_time(layout: str, backend: str) -> None:
    loss, results, _ = make_rows(layout, per_sequence=True)
    first = reduce(backend, loss, results)
    for _ in range(3):
        for mine, again in zip(first, reduce(backend, loss, results), strict=True):
            assert torch.equal(mine, again)


@pytest.mark.parametrize("layout", ["forty sequences", "many packed", "tokens"])
def test_without_a_live_token_every_sum_is_0_and_every_extreme_1(layout: str, backend: str) -> None:
    loss, results, _ = make_rows(layout, per_sequence=True, dead=2.0)
    total, stats = reduce(backend, loss, results)
    assert total == 0
    assert stats.tolist() == [0.0] * 16 + [1.0, 1.0]


@pytest.mark.parametrize("what", ["loss", "log_ratio", "cost"])
def test_nan_of_a_live_row_reaches_the_sums_that_it_is_part_of(what: str, backend: str) -> None:
    loss, results, gone = make_rows("forty sequences", per_sequence=False)
    row = int((~gone).nonzero()[77])
    if what == "cost":
        loss.arguments.costs.view(-1)[row] = math.nan
    else:
        results.rows[ROWS.index(what), row] = math.nan
    total, stats = reduce(backend, loss, results)
    lost = {name for name, value in zip(STATS, stats.tolist(), strict=True) if math.isnan(value)}
    assert total.isnan() == (what == "loss")
    assert lost == {
        "loss": set(),
        "cost": {"rectified_cost_sum", "penalty_sum"},
        "log_ratio": {
            "ratio_sum", "ratio_square_sum", "kl_old_k1_sum", "kl_old_k3_sum", "ratio_min", "ratio_max",
        },
    }[what]  # fmt: skip
