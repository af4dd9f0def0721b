"""Rows at the edges: dead rows, infinite logits, offsets, certain targets, ids out of range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from repo_kernels.backends import interface
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.interface import SCALARS, TOKENS, VALUES
from tests.support.kernels.triton_rows import (
    BLOCK,
    DTYPES,
    PLAIN,
    kill,
    make_rows,
    oracle,
    placed,
    random_logits,
    relative,
    run_and_check,
)


def test_kinks_fall_on_the_side_of_terms() -> None:
    logits = torch.zeros(4, 4)
    rows = make_rows(logits, replace(PLAIN, cost=interface.COST_GATED), eps_low=0.5, eps_high=1.0)
    logps = torch.full((4,), -float(np.log(np.float32(4.0))))
    values = rows.values
    values[VALUES.index("old_logps")] = logps
    values[VALUES.index("costs")] = torch.tensor([1.0, 1.0, 2.0, 0.0])
    values[VALUES.index("cost_limits")] = 1.0
    values[VALUES.index("reward_advantages")] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    _, tokens = gpu.fused(logits, None, rows, None)
    assert tokens[TOKENS.index("ratio")].tolist() == [1.0] * 4
    assert tokens[TOKENS.index("tokens_unsafe")].tolist() == [0.0, 0.0, 1.0, 0.0]
    # eps = 0: rho = 1 is on both bounds and clipped by neither
    no_room = rows.scalars.clone()
    no_room[[SCALARS.index("eps_low"), SCALARS.index("eps_high")]] = 0.0
    grad = torch.empty_like(logits)
    _, tokens = gpu.fused(logits, None, replace(rows, scalars=no_room), grad)
    assert not tokens[5:9].any()
    assert grad.count_nonzero() == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
def test_dead_rows_are_not_read(dtype: torch.dtype, entropy: int) -> None:
    logits = placed(random_logits(5, 83, dtype), 85, 1)
    dead = [0, 3]
    rows = kill(make_rows(logits, entropy=entropy, grad_scale=64.0), dead)
    logits[dead] = torch.nan
    grad = run_and_check(logits, rows)
    assert not grad[dead].any()
    state = gpu.statistics(logits, None, rows.ids, rows.scalars, 0.0, entropy)
    assert not state[:, dead].any()
    gpu.fused(logits, None, rows, logits)
    assert logits.equal(grad)
    storage = logits.as_strided((5, 85), (85, 1), 1)
    assert storage[:, 83:].isnan().all()


def test_all_rows_dead_and_no_rows() -> None:
    logits = torch.full((2, 9), torch.nan)
    rows = kill(make_rows(torch.zeros(2, 9)), [0, 1])
    grad = torch.ones(2, 9)
    losses, tokens = gpu.fused(logits, None, rows, grad)
    assert not losses.any()
    assert not tokens.any()
    assert not grad.any()
    none = replace(rows, ids=rows.ids[:0], values=rows.values[:, :0])
    losses, tokens = gpu.fused(logits[:0], None, none, grad[:0])
    assert losses.shape == (0,)
    assert tokens.shape == (13, 0)


@pytest.mark.parametrize("softcap_and_kl", [False, True])
@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("swept")
def test_infinite_logits(dtype: torch.dtype, entropy: int, softcap_and_kl: bool) -> None:
    columns = 2 * BLOCK[dtype] + 100
    logits = random_logits(3, columns, dtype)
    logits[0, : BLOCK[dtype]] = -torch.inf  # a leading block
    logits[1, 1::2] = -torch.inf
    logits[2, 7] = -torch.inf
    code, ref = PLAIN, None
    if softcap_and_kl:
        code, ref = replace(PLAIN, kl=interface.KL_FULL), random_logits(3, columns, dtype, seed=2)
        ref[logits == -torch.inf] = -torch.inf
    rows = make_rows(logits, code, entropy=entropy, grad_scale=256.0)
    run_and_check(logits, replace(rows, ids=torch.tensor([columns - 3, 200, 8])), ref)


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_at_minus_infinity(dtype: torch.dtype) -> None:
    logits = random_logits(2, 50, dtype)
    rows = replace(make_rows(logits, grad_scale=64.0), ids=torch.tensor([3, 20]))
    logits[[0, 1], [3, 20]] = -torch.inf
    rows.values[VALUES.index("old_logps"), 1] = -torch.inf  # impossible before, too: rho = 1
    grad = run_and_check(logits, rows)
    _, tokens = gpu.fused(logits, None, replace(rows, entropy=interface.ENTROPY_GRADIENT), grad)
    assert tokens[0].isinf().all()
    assert grad.isfinite().all()
    assert tokens[TOKENS.index("ratio"), 1] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [interface.ENTROPY_VALUE, interface.ENTROPY_GRADIENT])
def test_offsets(dtype: torch.dtype, entropy: int) -> None:
    for offset in (-150.0, 1e4):
        logits = (random_logits(4, 777, torch.float32) + offset).to(dtype)
        grad = run_and_check(logits, make_rows(logits, entropy=entropy, grad_scale=64.0))
        assert grad.isfinite().all()


@pytest.mark.parametrize("columns", [8, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_an_almost_certain_target(columns: int, dtype: torch.dtype) -> None:
    tops = [2.0, 9.0, 12.0, 16.0, 20.0, 34.0]
    logits = (random_logits(len(tops), columns, torch.float32) / 4).to(dtype)
    ids = torch.arange(len(tops)) % columns
    logits[torch.arange(len(tops)), ids] = torch.tensor(tops, dtype=dtype)
    rows = make_rows(logits, replace(PLAIN, on_policy=True))
    rows.values[VALUES.index("reward_advantages")] = 1.0
    for name in ("importance_weights", "weights"):
        rows.values[VALUES.index(name)] = 1.0
    rows = replace(rows, ids=ids)
    grad = torch.empty_like(logits)
    gpu.fused(logits, None, rows, grad)
    state = gpu.statistics(logits, None, ids, rows.scalars, 0.0, 0)
    two_step = torch.empty_like(logits)
    gpu.apply(logits, None, ids, state, oracle(logits, None, rows).slopes.float(), rows.scalars, 0.0, two_step)
    log_p = torch.log_softmax(logits.double(), -1).gather(1, ids[:, None]).squeeze(1)
    rest = -torch.expm1(log_p)
    for gradient in (grad, two_step):
        error = (-gradient.gather(1, ids[:, None]).squeeze(1).double() - rest).abs()
        assert (error <= torch.where(rest >= 1e-4, 4e-3 * rest, 2.0**-24)).all()


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
def test_an_id_outside_the_row_gives_nan_in_that_row_alone(bad: int) -> None:
    logits = random_logits(3, 50, torch.float32)
    rows = make_rows(logits)
    good = oracle(logits, None, rows)
    rows.ids[1] = bad
    for entropy in (interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT):
        grad = torch.zeros_like(logits)
        losses, tokens = gpu.fused(logits, None, replace(rows, entropy=entropy), grad)
        assert losses[1].isnan()
        assert tokens[0, 1].isnan()
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
    assert gpu.statistics(logits, None, rows.ids, rows.scalars, 0.0, 1)[0, 1].isnan()
    assert relative(losses[[0, 2]], good.losses[[0, 2]]) < 1e-5
