"""The C++ kernels where numbers end: poison, impossible entries, offsets, certain targets, ids out of range."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from repo_kernels.backends import cpu
from repo_kernels.backends.codes import ENTROPY_GRADIENT, ENTROPY_NONE, KL_FULL, KL_K1, KL_K2, KL_K3
from repo_kernels.backends.interface import RowResults
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.cpu_rows import DTYPES, OPTIONS, check
from tests.support.kernels.row_cases import TOKENS, Case, make_case, make_code, relative

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built"),
    pytest.mark.pairwise,
]

INF = math.inf


def poisoned(case: Case, poison: float) -> Case:
    """The case with `poison` in the logits of its dead rows."""
    logits, ref_logits = (
        m.masked_fill(~case.live.view(m.shape[:-1])[..., None], poison) for m in (case.logits, case.ref_logits)
    )
    return replace(case, logits=logits, ref_logits=ref_logits)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dead_rows_are_not_read_and_their_results_are_zero(isa: str, dtype: torch.dtype, poison: float) -> None:
    code = make_code(kl=KL_FULL)
    clean = make_case(5, (4, 6), 100, dtype, code, 0.0, ENTROPY_GRADIENT, dead=0.5, entropy_coef=0.1, **OPTIONS)
    case = poisoned(clean, poison)
    for mine, theirs in zip(case.run(cpu), clean.run(cpu), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    for mine in case.run(cpu, inplace=True):
        assert mine.isfinite().all()
    losses, tokens, grad = case.run(cpu)
    assert not losses[~case.live].any()
    assert not tokens[:, ~case.live].any()
    assert not grad[~case.live].any()


@pytest.mark.parametrize("kl", [KL_K3, KL_FULL])
@pytest.mark.parametrize("mask", [-INF, -1e30, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("where", ["leading", "trailing", "scattered"])
def test_impossible_entries_leave_everything_finite(isa: str, where: str, mask: float, kl: int) -> None:
    code = make_code(kl=kl)
    case = make_case(6, (6,), 9000, code=code, entropy=ENTROPY_GRADIENT, dead=0.0, entropy_coef=0.1, **OPTIONS)
    gone = {
        "leading": torch.arange(9000) < 6000,
        "trailing": torch.arange(9000) >= 3000,
        "scattered": torch.arange(9000) % 3 != 0,
    }[where]
    ids = (~gone).nonzero()[:6, 0]
    case.logits[:, gone], case.ref_logits[:, gone] = mask, -INF
    case = case.replace(token_ids=ids)
    check(case)
    for value in case.run(cpu):
        assert value.isfinite().all()
    assert not case.run(cpu)[2][:, gone].any()


@pytest.mark.parametrize("offset", [1e4, -1e4, -200.0, -3e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_common_offset_costs_no_accuracy(isa: str, temperature: float, offset: float) -> None:
    logits = 0.1 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(7)) + offset
    arguments = {"entropy_coef": 0.1, "temperature": temperature}
    case = make_case(8, logits=logits, entropy=ENTROPY_GRADIENT, dead=0.0, **arguments)
    check(case)
    assert (case.run(cpu)[1][0] <= 0).all()


def test_the_maximum_may_rise_in_every_block(isa: str) -> None:
    logits = torch.linspace(-300, 50, 20_001).repeat(3, 1)
    code = make_code(kl=KL_FULL)
    case = make_case(9, logits=logits, code=code, entropy=ENTROPY_GRADIENT, dead=0.0, entropy_coef=0.1, **OPTIONS)
    case = case.replace(token_ids=torch.tensor([20_000, 19_990, 19_000]))
    check(case)
    falling = replace(case, logits=logits.flip(1).contiguous(), ref_logits=case.ref_logits.flip(1).contiguous())
    falling = falling.replace(token_ids=20_000 - case.ids)
    assert relative(falling.run(cpu)[1][:3], case.run(cpu)[1][:3]) <= 1e-6


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kl", [KL_K1, KL_K2, KL_K3, KL_FULL])
def test_an_impossible_target_has_its_ratio_by_the_clamp(isa: str, kl: int, on_policy: bool) -> None:
    code = make_code(kl=kl, kl_importance_weighted=kl != KL_K2, on_policy=on_policy)
    case = make_case(10, (6,), 300, code=code, entropy=ENTROPY_GRADIENT, dead=0.0, entropy_coef=0.1, **OPTIONS)
    for matrix in (case.logits, case.ref_logits):
        matrix.scatter_(1, case.ids[:, None], -INF)
    losses, tokens, grad = case.run(cpu)
    by_name = dict(zip(TOKENS, tokens, strict=True))
    assert (by_name["logp"] == -INF).all()
    assert torch.allclose(by_name["ratio"], torch.tensor(0.0 if on_policy else -20.0).exp())
    assert losses.isfinite().all()
    assert tokens[1:].isfinite().all()
    assert grad.isfinite().all()
    impossible = torch.full((6,), -INF)
    before = case.replace(old_logps=impossible, ref_logps=impossible)
    assert (before.run(cpu)[1][TOKENS.index("ratio")] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [3, 5000])
@pytest.mark.parametrize("margin", [2.0, 5.0, 8.0, 12.0, 16.0, 20.0, 24.0])
def test_the_target_gradient_survives_a_probability_near_one(
    isa: str, margin: float, vocabulary: int, dtype: torch.dtype
) -> None:
    logits = torch.zeros(1, vocabulary)
    logits[0, 1] = margin
    logits = logits.to(dtype)
    ids, one = torch.tensor([1]), torch.ones(())
    state = cpu.statistics(logits, ids, one, 0.0, ENTROPY_NONE)
    grad, slopes = gradient_buffer(logits), torch.tensor([[1.0], [0.0], [0.0]])
    cpu.apply(logits, ids, state, slopes, one, 0.0, grad)
    exact = -math.expm1(-math.log1p((vocabulary - 1) * math.exp(-margin)))
    error = abs(grad[0, 1].item() - exact)
    assert error <= (4e-3 * exact if exact >= 1e-4 else 2**-24)
    assert abs(state[0, 0].item() + math.log1p((vocabulary - 1) * math.exp(-margin))) <= 2e-6 * exact
    if dtype == torch.float32:
        assert error <= 5e-6 * exact


@pytest.mark.parametrize("poison", [math.nan, INF])
@pytest.mark.parametrize("column", [0, 100, 4999])
def test_nan_in_a_live_row_is_not_hidden_and_stays_in_its_row(isa: str, column: int, poison: float) -> None:
    case = make_case(11, (4,), 5000, dead=0.0)
    case.logits[1, column] = poison
    losses, tokens, grad = case.run(cpu)
    assert losses[1].isnan()
    assert tokens[0, 1].isnan()
    assert grad[1].isnan().any()
    others = [0, 2, 3]
    assert losses[others].isfinite().all()
    assert grad[others].isfinite().all()


def test_a_nan_advantage_reaches_its_own_gradient_only_whatever_its_bits(isa: str) -> None:
    case = make_case(12, (4,), 40, torch.bfloat16, dead=0.0)
    case.arguments.reward_advantages[2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    grad = case.run(cpu)[2]
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 100, -99, 2**40])
def test_ids_out_of_range_raise_before_anything_is_written(isa: str, bad: int) -> None:
    case = make_case(13, (5,), 100, dead=0.0)
    case.ids[4] = bad
    before, ids = case.logits.clone(), case.ids
    state, slopes = torch.zeros(7, 5), torch.zeros(3, 5)
    results = RowResults.allocate(case.logits, 5, zeros=True)
    message = rf"token_ids of live rows must be in \[0, 100\) or -100; got {bad}"
    with pytest.raises(IndexError, match=message):
        cpu.fused(case.logits, None, case.loss, None, results, case.logits)
    with pytest.raises(IndexError, match=message):
        cpu.statistics(case.logits, ids, case.temperature, 0.0, ENTROPY_NONE)
    with pytest.raises(IndexError, match=message):
        cpu.apply(case.logits, ids, state, slopes, case.temperature, 0.0, case.logits)
    assert torch.equal(case.logits, before)
    assert not results.rows.any()
    assert not results.flags.any()
