"""Rows at the edges: dead rows, infinite logits, offsets, certain targets, ids out of range."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from repo_kernels.backends import codes
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.codes import CLIPPED_HIGH, CLIPPED_LOW, TOKEN_SUM
from tests.support.kernels.row_cases import TOKENS, oracle, relative, token_values
from tests.support.kernels.triton_rows import (
    BLOCK,
    DTYPES,
    PLAIN,
    kill,
    make_rows,
    placed,
    random_logits,
    run_and_check,
)


def test_kinks_fall_on_the_side_of_terms() -> None:
    logits = torch.zeros(4, 4)
    case = make_rows(logits, replace(PLAIN, cost=codes.COST_GATED), eps_low=0.5, eps_high=1.0).replace(
        old_logps=torch.full((4,), -float(np.log(np.float32(4.0)))),
        costs=torch.tensor([1.0, 1.0, 2.0, 0.0]),
        cost_limits=torch.ones(4),
        reward_advantages=torch.tensor([1.0, -1.0, 1.0, -1.0]),
    )
    tokens = token_values(case.into(gpu, logits, None))
    assert tokens[TOKENS.index("ratio")].tolist() == [1.0] * 4
    assert tokens[TOKENS.index("tokens_unsafe")].tolist() == [0.0, 0.0, 1.0, 0.0]
    # eps = 0: rho = 1 is on both bounds and clipped by neither
    grad = torch.empty_like(logits)
    results = case.replace(eps_low=0.0, eps_high=0.0).into(gpu, logits, grad)
    assert not (results.flags & (CLIPPED_LOW | CLIPPED_HIGH)).any()
    assert grad.count_nonzero() == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT])
def test_dead_rows_are_not_read(dtype: torch.dtype, entropy: int) -> None:
    logits = placed(random_logits(5, 83, dtype), 85, 1)
    dead = [0, 3]
    case = kill(make_rows(logits, entropy=entropy, grad_scale=64.0), dead)
    logits[dead] = torch.nan
    grad = run_and_check(case)
    assert not grad[dead].any()
    state = gpu.statistics(logits, case.ids, case.temperature, 0.0, entropy)
    assert not state[:, dead].any()
    case.into(gpu, logits, logits)
    assert logits.equal(grad)
    storage = logits.as_strided((5, 85), (85, 1), 1)
    assert storage[:, 83:].isnan().all()


def test_all_rows_dead_and_no_rows() -> None:
    logits = torch.full((2, 9), torch.nan)
    case = kill(make_rows(torch.zeros(2, 9)), [0, 1])
    grad = torch.ones(2, 9)
    results = case.into(gpu, logits, grad)
    assert not results.rows.any()
    assert not results.flags.any()
    assert not grad.any()
    none = make_rows(logits[:0])
    results = none.into(gpu, logits[:0], grad[:0])
    assert results.rows.shape == (5, 0)
    assert results.flags.shape == (0,)


@pytest.mark.parametrize("softcap_and_kl", [False, True])
@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_logits(dtype: torch.dtype, entropy: int, softcap_and_kl: bool) -> None:
    columns = 2 * BLOCK[dtype] + 100
    logits = random_logits(3, columns, dtype)
    logits[0, : BLOCK[dtype]] = -torch.inf  # a leading block
    logits[1, 1::2] = -torch.inf
    logits[2, 7] = -torch.inf
    code, ref = PLAIN, None
    if softcap_and_kl:
        code, ref = replace(PLAIN, kl=codes.KL_FULL), random_logits(3, columns, dtype, seed=2)
        ref[logits == -torch.inf] = -torch.inf
    case = make_rows(logits, code, entropy, ref_logits=ref, grad_scale=256.0)
    run_and_check(case.replace(token_ids=torch.tensor([columns - 3, 200, 8])))


@pytest.mark.parametrize("dtype", DTYPES)
def test_target_at_minus_infinity(dtype: torch.dtype) -> None:
    logits = random_logits(2, 50, dtype)
    case = make_rows(logits, grad_scale=64.0).replace(token_ids=torch.tensor([3, 20]))
    logits[[0, 1], [3, 20]] = -torch.inf
    case.arguments.old_logps[1] = -torch.inf  # impossible before, too: rho = 1
    grad = run_and_check(case)
    with_entropy = replace(case, loss=replace(case.loss, entropy=codes.ENTROPY_GRADIENT))
    tokens = token_values(with_entropy.into(gpu, logits, grad))
    assert tokens[0].isinf().all()
    assert grad.isfinite().all()
    assert tokens[TOKENS.index("ratio"), 1] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [codes.ENTROPY_VALUE, codes.ENTROPY_GRADIENT])
def test_offsets(dtype: torch.dtype, entropy: int) -> None:
    for offset in (-150.0, 1e4):
        logits = (random_logits(4, 777, torch.float32) + offset).to(dtype)
        grad = run_and_check(make_rows(logits, entropy=entropy, grad_scale=64.0))
        assert grad.isfinite().all()


@pytest.mark.parametrize("columns", [8, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_an_almost_certain_target(columns: int, dtype: torch.dtype) -> None:
    tops = [2.0, 9.0, 12.0, 16.0, 20.0, 34.0]
    logits = (random_logits(len(tops), columns, torch.float32) / 4).to(dtype)
    ids = torch.arange(len(tops)) % columns
    logits[torch.arange(len(tops)), ids] = torch.tensor(tops, dtype=dtype)
    ones = torch.ones(len(tops))
    case = make_rows(logits, replace(PLAIN, on_policy=True, aggregation=TOKEN_SUM, divisor=False)).replace(
        token_ids=ids, reward_advantages=ones, importance_weights=ones
    )
    grad = torch.empty_like(logits)
    case.into(gpu, logits, grad)
    state = gpu.statistics(logits, ids, case.temperature, 0.0, 0)
    two_step = torch.empty_like(logits)
    gpu.apply(logits, ids, state, oracle(case).slopes.float(), case.temperature, 0.0, two_step)
    log_p = torch.log_softmax(logits.double(), -1).gather(1, ids[:, None]).squeeze(1)
    rest = -torch.expm1(log_p)
    for gradient in (grad, two_step):
        error = (-gradient.gather(1, ids[:, None]).squeeze(1).double() - rest).abs()
        assert (error <= torch.where(rest >= 1e-4, 4e-3 * rest, 2.0**-24)).all()


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**40)])
def test_an_id_outside_the_row_gives_nan_in_that_row_alone(bad: int) -> None:
    logits = random_logits(3, 50, torch.float32)
    case = make_rows(logits)
    good = oracle(case)
    case.ids[1] = bad
    for entropy in (codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT):
        grad = torch.zeros_like(logits)
        results = replace(case, loss=replace(case.loss, entropy=entropy)).into(gpu, logits, grad)
        losses, tokens = results.rows[0], token_values(results)
        assert losses[1].isnan()
        assert tokens[0, 1].isnan()
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
    assert gpu.statistics(logits, case.ids, case.temperature, 0.0, 1)[0, 1].isnan()
    assert relative(losses[[0, 2]], good.losses[[0, 2]]) < 1e-5
