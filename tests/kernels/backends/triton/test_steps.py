"""The two steps of the Triton kernels against the fused loss, their bits, and the choice of a variant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from repo_kernels.backends import interface
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.interface import TOKENS, gradient_buffer
from repo_kernels.backends.triton import variants
from tests.support.kernels.triton_rows import (
    DTYPES,
    GRADIENT_TOLERANCE,
    PLAIN,
    kill,
    make_rows,
    oracle,
    placed,
    random_logits,
    relative,
)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_step_form_agrees_with_the_fused_one(softcap: float, full: bool, dtype: torch.dtype) -> None:
    logits = placed(random_logits(4, 301, dtype), 303, 5)
    ref = placed(random_logits(4, 301, dtype, seed=3), 303, 5) if full else None
    code = replace(PLAIN, kl=interface.KL_FULL) if full else PLAIN
    rows = make_rows(logits, code, softcap, interface.ENTROPY_GRADIENT, grad_scale=64.0)
    rows = kill(rows, [2])
    expected = oracle(logits, ref, rows)
    state = gpu.statistics(logits, ref, rows.ids, rows.scalars, softcap, interface.ENTROPY_VALUE)
    assert relative(state[0], expected.tokens[TOKENS.index("logp")]) <= 1e-6
    assert relative(state[1], expected.tokens[TOKENS.index("entropy")]) <= 1e-6
    if full:
        assert relative(state[2], expected.tokens[TOKENS.index("kl")]) <= 2e-6
    slopes, grad, fused_grad = expected.slopes.float(), gradient_buffer(logits), gradient_buffer(logits)
    gpu.apply(logits, ref, rows.ids, state, slopes, rows.scalars, softcap, grad)
    assert relative(grad, expected.grad) <= GRADIENT_TOLERANCE[dtype]
    gpu.fused(logits, ref, rows, fused_grad)
    assert relative(grad, fused_grad) <= GRADIENT_TOLERANCE[dtype]
    gpu.apply(logits, ref, rows.ids, state, slopes, rows.scalars, softcap, logits)
    assert logits.equal(grad)


@pytest.mark.parametrize("entropy", [interface.ENTROPY_NONE, interface.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_place_again_and_alone(entropy: int, dtype: torch.dtype) -> None:
    logits = placed(random_logits(4, 1237, dtype), 1239, 2)
    rows = make_rows(logits, entropy=entropy, grad_scale=64.0)
    grad, again = gradient_buffer(logits), gradient_buffer(logits)
    first, second = gpu.fused(logits, None, rows, grad), gpu.fused(logits, None, rows, again)
    assert grad.equal(again)
    assert first[0].equal(second[0])
    assert first[1].equal(second[1])
    alone = gradient_buffer(logits[2:3])
    one = replace(rows, ids=rows.ids[2:3], values=rows.values[:, 2:3].contiguous())
    losses, _ = gpu.fused(logits[2:3], None, one, alone)
    assert alone.equal(grad[2:3])
    assert losses.equal(first[0][2:3])
    forward, tokens = gpu.fused(logits, None, rows, None)
    assert forward.equal(first[0])
    assert tokens.equal(first[1])
    gpu.fused(logits, None, rows, logits)
    assert logits.equal(grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_rows(dtype: torch.dtype) -> None:
    values = random_logits(5, 91, dtype)
    factors = torch.tensor([1.0, -0.3, 0.0, 7.0, 1.0])
    strided = torch.stack([factors, torch.zeros(5)], 1)[:, 0]
    for upstream in (factors, strided, torch.tensor(0.37).expand(5)):
        grad = placed(values, 93, 1)
        gpu.scale_rows(grad, upstream)
        assert grad.equal((values.float() * upstream[:, None]).to(dtype))


def test_variants_fit_the_limit_and_their_warps_the_target() -> None:
    for warp_size in (32, 64):
        found = variants.variants(warp_size)
        assert len(found) <= 48
        assert len({v.name for v in found}) == len(found)
        assert max(v.num_warps for v in found) * warp_size <= 1024
        for v in found:
            assert set(v.signature) == set(v.kernel.arg_names)
