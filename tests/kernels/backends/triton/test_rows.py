"""The Triton kernels over rows, in Triton's interpreter, against an fp64 oracle of log_softmax and terms.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repo_kernels.backends import codes
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.row_cases import make_code, oracle, token_values
from tests.support.kernels.triton_rows import (
    BLOCK,
    DTYPES,
    PLAIN,
    check,
    kill,
    make_rows,
    placed,
    random_logits,
    run_and_check,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33, 500, 1000, 2051])
def test_rows_of_any_length(columns: int, dtype: torch.dtype) -> None:
    logits = random_logits(2, columns, dtype)
    for entropy in (codes.ENTROPY_NONE, codes.ENTROPY_VALUE, codes.ENTROPY_GRADIENT):
        run_and_check(make_rows(logits, entropy=entropy, grad_scale=64.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1.0, 1.4, 2.0, 2.7, 3.0])
def test_rows_of_whole_and_broken_blocks(blocks: float, dtype: torch.dtype) -> None:
    logits = random_logits(2, int(blocks * BLOCK[dtype]), dtype)
    run_and_check(make_rows(logits, entropy=codes.ENTROPY_VALUE, grad_scale=256.0))


@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT])
@pytest.mark.parametrize(
    ("columns", "dtype"), [(50257, torch.bfloat16), (24578, torch.float32), (65537, torch.float16)]
)
@pytest.mark.usefixtures("real_blocks")
def test_long_rows(columns: int, dtype: torch.dtype, entropy: int) -> None:
    logits = random_logits(2, columns, dtype)
    case = make_rows(logits, entropy=entropy, grad_scale=512.0)
    # the targets' pieces: in the first block, in the last whole one, in the short one, in the edges
    for ids in ([5, 40000 % columns], [columns - 20, columns - 1]):
        run_and_check(case.replace(token_ids=torch.tensor(ids)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT])
def test_every_alignment_of_base_and_stride(dtype: torch.dtype, entropy: int) -> None:
    values = random_logits(2, 75, dtype)
    case = make_rows(values, entropy=entropy, grad_scale=64.0)
    expected = oracle(case)
    for offset in range(16 // dtype.itemsize):
        logits = placed(values, 75 + (offset * 3) % 7, offset)
        grad = gradient_buffer(logits) if offset % 3 else torch.empty(2, 75, dtype=dtype)
        results = case.into(gpu, logits, grad)
        check(results.rows[0], token_values(results), grad, expected, dtype)
        assert logits.equal(values)
        case.into(gpu, logits, logits)
        assert logits.equal(grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT])
def test_a_temperature_for_each_row(dtype: torch.dtype, entropy: int) -> None:
    case = kill(make_rows(random_logits(4, 301, dtype), entropy=entropy, grad_scale=64.0), [2])
    by = torch.tensor([0.5, 1.0, torch.nan, 2.0])
    run_and_check(case.replace(temperatures=by))
    run_and_check(case.replace(temperatures=torch.stack((by, 9 * by), 1)[:, 0]))  # a stride of two


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_longer_sequence(dtype: torch.dtype) -> None:
    whole = random_logits(3 * 4, 37, dtype).view(3, 4, 37)
    logits = whole[:, :-1]
    case = make_rows(logits, grad_scale=64.0)
    grad = gradient_buffer(logits)
    results = case.into(gpu, logits, grad)
    check(results.rows[0], token_values(results), grad.reshape(9, 37), oracle(case), dtype)
    last = whole[:, -1].clone()
    case.into(gpu, logits, logits)
    assert whole[:, -1].equal(last)
    assert logits.equal(grad)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_full_kl(softcap: float, full: bool, dtype: torch.dtype) -> None:
    code = replace(PLAIN, kl=codes.KL_FULL) if full else PLAIN
    for columns, entropy in (
        (7, codes.ENTROPY_NONE),
        (333, codes.ENTROPY_VALUE),
        (1501, codes.ENTROPY_GRADIENT),
    ):
        logits = placed(random_logits(2, columns, dtype), columns + 1, 3)
        ref = random_logits(2, columns, dtype, seed=1) if full else None  # lies differently: a copy is made
        options = {"softcap": softcap, "ref_logits": ref, "temperature": 0.8, "grad_scale": 256.0}
        run_and_check(make_rows(logits, code, entropy, **options))


@pytest.mark.parametrize("kl", [codes.KL_NONE, codes.KL_K1, codes.KL_K2, codes.KL_K3])
@pytest.mark.parametrize("cost", [codes.COST_NONE, codes.COST_GIVEN, codes.COST_GATED, codes.COST_HINGE])
def test_options_of_the_token_terms(cost: int, kl: int) -> None:
    logits = random_logits(8, 41, torch.float32)
    for kl_importance_weighted, normalize, on_policy in (
        (False, False, False),
        (True, True, False),
        (True, False, True),
    ):
        code = make_code(cost, kl, kl_importance_weighted, normalize, on_policy)
        case = make_rows(logits, code, temperature=1.3, dual_clip=1.2 if normalize else torch.inf)
        case.arguments.old_logps[:3] += torch.tensor([40.0, -40.0, 3.0])  # clamped, clamped, clipped
        case.arguments.ref_logps[3:6] += torch.tensor([40.0, -40.0, 3.0])
        run_and_check(case)
