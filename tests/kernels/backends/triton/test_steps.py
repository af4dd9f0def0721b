"""The two steps of the Triton kernels against the fused loss, their bits, and the choice of a variant."""

from __future__ import annotations

import pytest
import torch

from repo_kernels.backends import codes
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.codes import TOKEN_MEAN
from repo_kernels.backends.memory_layout import gradient_buffer
from repo_kernels.backends.triton import variants
from repo_kernels.backends.triton.forms import Target
from tests.support.kernels.row_cases import TOKENS, make_code, oracle, relative
from tests.support.kernels.triton_rows import DTYPES, GRADIENT_TOLERANCE, PLAIN, kill, make_rows, placed, random_logits

MOST_VARIANTS = 104  # for each target; compiling them takes minutes


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_step_form_agrees_with_the_fused_one(softcap: float, dtype: torch.dtype) -> None:
    logits = placed(random_logits(4, 301, dtype), 303, 5)
    case = kill(make_rows(logits, PLAIN, codes.ENTROPY_GRADIENT, softcap=softcap, grad_scale=64.0), [2])
    expected, temperature = oracle(case), case.temperature
    state = gpu.statistics(logits, case.ids, temperature, softcap, codes.ENTROPY_VALUE)
    assert relative(state[0], expected.tokens[TOKENS.index("logp")]) <= 1e-6
    assert relative(state[1], expected.tokens[TOKENS.index("entropy")]) <= 1e-6
    slopes, grad, fused_grad = expected.slopes.float(), gradient_buffer(logits), gradient_buffer(logits)
    gpu.apply(logits, case.ids, state, slopes, temperature, softcap, grad)
    assert relative(grad, expected.grad) <= GRADIENT_TOLERANCE[dtype]
    case.into(gpu, logits, fused_grad)
    assert relative(grad, fused_grad) <= GRADIENT_TOLERANCE[dtype]
    gpu.apply(logits, case.ids, state, slopes, temperature, softcap, logits)
    assert logits.equal(grad)


@pytest.mark.parametrize("entropy", [codes.ENTROPY_NONE, codes.ENTROPY_GRADIENT])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_in_place_again_and_alone(entropy: int, dtype: torch.dtype) -> None:
    logits = placed(random_logits(4, 1237, dtype), 1239, 2)
    code = make_code(codes.COST_NONE, codes.KL_NONE, aggregation=TOKEN_MEAN)  # the same weight alone
    case = make_rows(logits, code, entropy, grad_scale=64.0)
    grad, again = gradient_buffer(logits), gradient_buffer(logits)
    first, second = case.into(gpu, logits, grad), case.into(gpu, logits, again)
    assert grad.equal(again)
    assert first.rows.equal(second.rows)
    assert first.flags.equal(second.flags)
    alone = gradient_buffer(logits[2:3])
    one = case.of_rows(2, 3).into(gpu, logits[2:3], alone)
    assert alone.equal(grad[2:3])
    assert one.rows.equal(first.rows[:, 2:3])
    forward = case.into(gpu, logits, None)
    assert forward.rows.equal(first.rows)
    assert forward.flags.equal(first.flags)
    case.into(gpu, logits, logits)
    assert logits.equal(grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_rows(dtype: torch.dtype) -> None:
    values = random_logits(5, 91, dtype)
    factors = torch.tensor([1.0, -0.3, 0.0, 7.0, 1.0])
    strided = torch.stack([factors, torch.zeros(5)], 1)[:, 0]
    for upstream in (factors, strided, torch.tensor(0.37).expand(5), torch.tensor(0.37)):
        grad = placed(values, 93, 1)
        gpu.scale_rows(grad, upstream, None)
        assert grad.equal((values.float() * upstream.expand(5)[:, None]).to(dtype))
    flags = torch.tensor([1, 0, 0, 3, 0], dtype=torch.int32)
    grad = placed(values, 93, 1)
    grad[flags == 0] = 0
    gpu.scale_rows(grad, torch.tensor([2.0, torch.inf, torch.nan, -1.0, torch.inf]), flags)
    expected = torch.tensor([2.0, 0.0, 0.0, -1.0, 0.0])
    assert grad.equal((values.float() * expected[:, None]).to(dtype))


@pytest.mark.parametrize(
    "target", [Target(32), Target(32, blackwell=True), Target(64)], ids=["wave32", "sm_100", "wave64"]
)
@pytest.mark.usefixtures("real_blocks")
def test_variants_fit_the_limit_and_their_warps_the_target(target: Target) -> None:
    reachable, measured = variants.variants(target), variants.candidates(target)
    assert len(reachable) <= MOST_VARIANTS
    everything = reachable + measured
    assert len({v.name for v in everything}) == len(everything)
    assert max(v.num_warps for v in everything) * target.warp_size <= 1024
    for v in everything:
        assert set(v.signature) == set(v.kernel.arg_names)
        assert v.elements_per_thread * v.num_warps * target.warp_size == v.constexprs.get("R", 0) * v.constexprs.get(
            "E", 0
        )
