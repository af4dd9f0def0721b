"""The Triton kernels over flat rows, in Triton's interpreter, against an fp64 oracle of log_softmax and terms.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repo_kernels.backends import interface
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.interface import VALUES, Code, gradient_buffer
from tests.support.kernels.triton_rows import (
    BLOCK,
    DTYPES,
    PLAIN,
    check,
    make_rows,
    oracle,
    placed,
    random_logits,
    run_and_check,
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 33, 500])
def test_resident_rows(columns: int, dtype: torch.dtype) -> None:
    logits = random_logits(2, columns, dtype)
    for entropy in (interface.ENTROPY_NONE, interface.ENTROPY_VALUE):
        run_and_check(logits, make_rows(logits, entropy=entropy, grad_scale=64.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [1.0, 1.4, 2.0, 2.7, 3.0])
def test_resident_rows_of_several_blocks(blocks: float, dtype: torch.dtype) -> None:
    logits = random_logits(2, int(blocks * BLOCK[dtype]), dtype)
    run_and_check(logits, make_rows(logits, entropy=interface.ENTROPY_VALUE, grad_scale=256.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 33, 1000, 2051])
@pytest.mark.usefixtures("swept")
def test_swept_rows(columns: int, dtype: torch.dtype) -> None:
    logits = random_logits(2, columns, dtype)
    for entropy in (interface.ENTROPY_NONE, interface.ENTROPY_VALUE, interface.ENTROPY_GRADIENT):
        run_and_check(logits, make_rows(logits, entropy=entropy, grad_scale=64.0))


@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
@pytest.mark.parametrize(
    ("columns", "dtype"), [(50257, torch.bfloat16), (24578, torch.float32), (65537, torch.float16)]
)
@pytest.mark.usefixtures("real_blocks")
def test_long_rows(columns: int, dtype: torch.dtype, entropy: int) -> None:
    logits = random_logits(2, columns, dtype)
    rows = make_rows(logits, entropy=entropy, grad_scale=512.0)
    # the targets' pieces: in the first block, in the last whole one, in the short one, in the edges
    for ids in ([5, 40000 % columns], [columns - 20, columns - 1]):
        run_and_check(logits, replace(rows, ids=torch.tensor(ids)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
def test_every_alignment_of_base_and_stride(dtype: torch.dtype, entropy: int) -> None:
    values = random_logits(2, 75, dtype)
    rows = make_rows(values, entropy=entropy, grad_scale=64.0)
    expected = oracle(values, None, rows)
    for offset in range(16 // dtype.itemsize):
        logits = placed(values, 75 + (offset * 3) % 7, offset)
        grad = gradient_buffer(logits) if offset % 3 else torch.empty(2, 75, dtype=dtype)
        losses, tokens = gpu.fused(logits, None, rows, grad)
        check(losses, tokens, grad, expected, dtype)
        assert logits.equal(values)
        gpu.fused(logits, None, rows, logits)
        assert logits.equal(grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_longer_sequence(dtype: torch.dtype) -> None:
    whole = random_logits(3 * 4, 37, dtype).view(3, 4, 37)
    logits, plain = whole[:, :-1], whole[:, :-1].reshape(9, 37)
    rows = make_rows(plain, grad_scale=64.0)
    grad = gradient_buffer(logits)
    losses, tokens = gpu.fused(logits, None, rows, grad)
    check(losses, tokens, grad.reshape(9, 37), oracle(plain, None, rows), dtype)
    last = whole[:, -1].clone()
    gpu.fused(logits, None, rows, logits)
    assert whole[:, -1].equal(last)
    assert logits.equal(grad)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap_and_full_kl(softcap: float, full: bool, dtype: torch.dtype) -> None:
    code = replace(PLAIN, kl=interface.KL_FULL) if full else PLAIN
    for columns, entropy in (
        (7, interface.ENTROPY_NONE),
        (333, interface.ENTROPY_VALUE),
        (1501, interface.ENTROPY_GRADIENT),
    ):
        logits = placed(random_logits(2, columns, dtype), columns + 1, 3)
        ref = random_logits(2, columns, dtype, seed=1) if full else None  # lies differently: a copy is made
        rows = make_rows(logits, code, softcap, entropy, temperature=0.8, grad_scale=256.0)
        run_and_check(logits, rows, ref)


@pytest.mark.parametrize("kl", [interface.KL_NONE, interface.KL_K1, interface.KL_K2, interface.KL_K3])
@pytest.mark.parametrize(
    "cost", [interface.COST_NONE, interface.COST_GIVEN, interface.COST_GATED, interface.COST_HINGE]
)
def test_options_of_the_token_terms(cost: int, kl: int) -> None:
    logits = random_logits(8, 41, torch.float32)
    for kl_importance_weighted, normalize, on_policy in (
        (False, False, False),
        (True, True, False),
        (True, False, True),
    ):
        code = Code(cost, kl, kl_importance_weighted, normalize, on_policy)
        rows = make_rows(logits, code, temperature=1.3, dual_clip=1.2 if normalize else torch.inf)
        rows.values[VALUES.index("old_logps"), :3] += torch.tensor([40.0, -40.0, 3.0])  # clamped, clamped, clipped
        rows.values[VALUES.index("ref_logps"), 3:6] += torch.tensor([40.0, -40.0, 3.0])
        run_and_check(logits, rows)
