"""The C++ backend's four functions over rows, on every instruction set of this machine, against float64."""

from __future__ import annotations

import itertools
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repo_kernels.backends import cpu
from repo_kernels.backends.eager.terms import coefficients, token_inputs, token_terms
from repo_kernels.backends.interface import (
    COST_GATED,
    COST_GIVEN,
    COST_HINGE,
    COST_NONE,
    ENTROPY_GRADIENT,
    ENTROPY_NONE,
    KL_FULL,
    KL_K1,
    KL_K2,
    KL_K3,
    KL_NAMES,
    KL_NONE,
    TOKENS,
    VALUES,
    Code,
    gradient_buffer,
)

from .row_cases import Case, flat, make_case, oracle, relative

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built")

if cpu.available():
    from repo_kernels import _cpu

    ISAS = _cpu._isas()
else:
    ISAS = ["none"]

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu._set_isa(request.param)
    yield request.param
    _cpu._set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(case: Case, tolerance: float = 1e-6) -> None:
    """The fused loss against float64, in place against out of place, and the two steps against the fused loss."""
    expected, dtype = oracle(case), case.logits.dtype
    losses, tokens, grad = case.loss(cpu)
    assert relative(losses, expected.losses) <= 4 * tolerance  # terms of both signs
    for name, got, exact in zip(TOKENS, tokens, expected.tokens, strict=True):
        # the ratio and what is formed from it carry the error of the difference of two log-probabilities
        slack = 1 if name in ("logp", "entropy", "kl") else 8
        assert relative(got, exact) <= slack * tolerance or (got - exact).abs().max() <= 1e-6, name
    # with one entry the gradient is 0
    assert relative(grad, expected.grad) <= GRADIENT_TOLERANCE[dtype] or grad.shape[1] == 1
    assert grad.shape[1] > 1 or grad.abs().max() <= 1e-12
    assert not grad[~case.live].any()
    again = case.loss(cpu, inplace=True)
    for mine, inplace in zip((losses, tokens, grad), again, strict=True):
        assert torch.equal(mine, inplace)


CODES = [
    Code(cost, kl, kl_ratio, normalize, on_policy)
    for (cost, kl, kl_ratio), (normalize, on_policy) in zip(
        [
            (COST_NONE, KL_NONE, True),
            (COST_GIVEN, KL_K1, True),
            (COST_GATED, KL_K2, False),
            (COST_HINGE, KL_K3, True),
            (COST_GIVEN, KL_K3, False),
            (COST_HINGE, KL_FULL, False),
            (COST_GATED, KL_K3, True),
            (COST_NONE, KL_FULL, True),
        ],
        itertools.cycle([(False, False), (True, False), (False, True)]),
        strict=False,
    )
]
OPTIONS = {"lam": 0.7, "beta": 0.3, "dual_clip": 1.5, "temperature": 0.9}


@pytest.mark.parametrize("code", CODES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["", "softcap"])
@pytest.mark.parametrize("alpha", [0.0, 0.1], ids=["", "entropy"])
def test_every_option_agrees_with_float64(isa: str, code: Code, softcap: float, alpha: float) -> None:
    entropy = ENTROPY_GRADIENT if alpha else ENTROPY_NONE
    case = make_case(1, (3, 9), 333, code=code, softcap=softcap, entropy=entropy, entropy_coef=alpha, **OPTIONS)
    check(case)


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 33, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vocabulary_and_type_agrees_with_float64(isa: str, dtype: torch.dtype, vocabulary: int) -> None:
    scale = float(max(vocabulary // 8, 1)) if dtype == torch.float16 else 1.0  # out of the subnormal numbers
    arguments = {"grad_scale": scale, "entropy_coef": 0.1, **OPTIONS}
    for seed, kl in enumerate((KL_K3, KL_FULL)):
        code = Code(COST_GIVEN, kl, True, False, False)
        case = make_case(seed, (11,), vocabulary, dtype, code, 0.0, ENTROPY_GRADIENT, scale=1.0, **arguments)
        check(case)


def views(dtype: torch.dtype) -> dict[str, Tensor]:
    """Logits that are no plain matrix."""
    base = (2 * torch.randn(4, 7, 131, generator=torch.Generator().manual_seed(2))).to(dtype)
    return {
        "without the last token": base[:, :-1],
        "odd stride": base[..., :101],
        "unaligned base": base[..., 3:],
        "transposed leading dimensions": base.transpose(0, 1),
        "every second row": base.reshape(28, 131)[::2, 1:120],
        "one row repeated": base[:1, :1].expand(3, 5, 131),
        "no rows": base[:0],
    }


@pytest.mark.parametrize("name", list(views(torch.float32)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_where_they_are_and_have_the_bits_of_a_copy(isa: str, dtype: torch.dtype, name: str) -> None:
    logits = views(dtype)[name]
    code = Code(COST_GIVEN, KL_FULL, True, False, False)
    case = make_case(3, logits=logits, code=code, entropy=ENTROPY_GRADIENT, entropy_coef=0.1, **OPTIONS)
    copy = replace(case, logits=logits.contiguous())
    for of_view, of_copy in zip(case.loss(cpu), copy.loss(cpu), strict=True):
        assert torch.equal(of_view, of_copy)
    if logits.numel():
        assert relative(case.loss(cpu)[2], oracle(case).grad) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [KL_K3, KL_FULL])
def test_two_steps_are_the_fused_loss(isa: str, kl: int, dtype: torch.dtype) -> None:
    code = Code(COST_GIVEN, kl, True, False, False)
    arguments = {"entropy_coef": 0.1, "grad_scale": 8.0, **OPTIONS}
    case = make_case(4, (3, 8), 777, dtype, code, 7.0, ENTROPY_GRADIENT, **arguments)
    rows, live = case.rows, case.live
    _, tokens, grad = case.loss(cpu)
    state = cpu.statistics(case.logits, case.reference, rows.ids, rows.scalars, rows.softcap, rows.entropy)
    assert torch.equal(state[:2], tokens[:2])
    assert torch.equal(state[2], tokens[2]) or kl != KL_FULL
    assert not state[:, ~live].any()

    coef = coefficients(rows.scalars)
    inputs = token_inputs(rows.values[:, live], rows.scalars, code)
    logps, entropy, full_kl = state[:3, live]
    kl_of_rows = full_kl if kl == KL_FULL else None
    terms = token_terms(inputs, logps, entropy, kl_of_rows, coef, KL_NAMES[kl], code.kl_ratio)
    slopes = torch.full((3, live.numel()), math.nan)
    slopes[:, live] = torch.stack((terms.g_logp, terms.g_entropy, terms.g_kl)) * coef.grad_scale
    out = gradient_buffer(case.logits).fill_(math.nan)
    cpu.apply(case.logits, case.reference, rows.ids, state, slopes, rows.scalars, rows.softcap, out)
    assert relative(flat(out), grad) <= 1e-6 if dtype == torch.float32 else GRADIENT_TOLERANCE[dtype]


def poisoned(case: Case, poison: float) -> Case:
    """The case with `poison` in the logits of its dead rows."""
    logits, ref_logits = (
        m.masked_fill(~case.live.view(m.shape[:-1])[..., None], poison) for m in (case.logits, case.ref_logits)
    )
    return replace(case, logits=logits, ref_logits=ref_logits)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dead_rows_are_not_read_and_their_results_are_zero(isa: str, dtype: torch.dtype, poison: float) -> None:
    code = Code(COST_GIVEN, KL_FULL, True, False, False)
    clean = make_case(5, (4, 6), 100, dtype, code, 0.0, ENTROPY_GRADIENT, dead=0.5, entropy_coef=0.1, **OPTIONS)
    case = poisoned(clean, poison)
    for mine, theirs in zip(case.loss(cpu), clean.loss(cpu), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.isfinite().all()
    for mine in case.loss(cpu, inplace=True):
        assert mine.isfinite().all()
    losses, tokens, grad = case.loss(cpu)
    assert not losses[~case.live].any()
    assert not tokens[:, ~case.live].any()
    assert not grad[~case.live].any()


@pytest.mark.parametrize("kl", [KL_K3, KL_FULL])
@pytest.mark.parametrize("mask", [-INF, -1e30, torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("where", ["leading", "trailing", "scattered"])
def test_impossible_entries_leave_everything_finite(isa: str, where: str, mask: float, kl: int) -> None:
    code = Code(COST_GIVEN, kl, True, False, False)
    case = make_case(6, (6,), 9000, code=code, entropy=ENTROPY_GRADIENT, dead=0.0, entropy_coef=0.1, **OPTIONS)
    gone = {
        "leading": torch.arange(9000) < 6000,
        "trailing": torch.arange(9000) >= 3000,
        "scattered": torch.arange(9000) % 3 != 0,
    }[where]
    ids = (~gone).nonzero()[:6, 0]
    case.logits[:, gone], case.ref_logits[:, gone] = mask, -INF
    case = replace(case, rows=replace(case.rows, ids=ids))
    check(case)
    for value in case.loss(cpu):
        assert value.isfinite().all()
    assert not case.loss(cpu)[2][:, gone].any()


@pytest.mark.parametrize("offset", [1e4, -1e4, -200.0, -3e4])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_common_offset_costs_no_accuracy(isa: str, temperature: float, offset: float) -> None:
    logits = 0.1 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(7)) + offset
    arguments = {"entropy_coef": 0.1, "temperature": temperature}
    case = make_case(8, logits=logits, entropy=ENTROPY_GRADIENT, dead=0.0, **arguments)
    check(case)
    assert (case.loss(cpu)[1][0] <= 0).all()


def test_the_maximum_may_rise_in_every_block(isa: str) -> None:
    logits = torch.linspace(-300, 50, 20_001).repeat(3, 1)
    code = Code(COST_GIVEN, KL_FULL, True, False, False)
    case = make_case(9, logits=logits, code=code, entropy=ENTROPY_GRADIENT, dead=0.0, entropy_coef=0.1, **OPTIONS)
    case = replace(case, rows=replace(case.rows, ids=torch.tensor([20_000, 19_990, 19_000])))
    check(case)
    falling = replace(case, logits=logits.flip(1).contiguous(), ref_logits=case.ref_logits.flip(1).contiguous())
    falling = replace(falling, rows=replace(case.rows, ids=20_000 - case.rows.ids))
    assert relative(falling.loss(cpu)[1][:3], case.loss(cpu)[1][:3]) <= 1e-6


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("kl", [KL_K1, KL_K2, KL_K3, KL_FULL])
def test_an_impossible_target_has_its_ratio_by_the_clamp(isa: str, kl: int, on_policy: bool) -> None:
    code = Code(COST_GIVEN, kl, kl != KL_K2, False, on_policy)
    case = make_case(10, (6,), 300, code=code, entropy=ENTROPY_GRADIENT, dead=0.0, entropy_coef=0.1, **OPTIONS)
    for matrix in (case.logits, case.ref_logits):
        matrix.scatter_(1, case.rows.ids[:, None], -INF)
    losses, tokens, grad = case.loss(cpu)
    by_name = dict(zip(TOKENS, tokens, strict=True))
    assert (by_name["logp"] == -INF).all()
    assert torch.allclose(by_name["ratio"], torch.tensor(0.0 if on_policy else -20.0).exp())
    assert losses.isfinite().all()
    assert tokens[1:].isfinite().all()
    assert grad.isfinite().all()
    case.rows.values[VALUES.index("old_logps")] = case.rows.values[VALUES.index("ref_logps")] = -INF
    assert (case.loss(cpu)[1][TOKENS.index("ratio")] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [3, 5000])
@pytest.mark.parametrize("margin", [2.0, 5.0, 8.0, 12.0, 16.0, 20.0, 24.0])
def test_the_target_gradient_survives_a_probability_near_one(
    isa: str, margin: float, vocabulary: int, dtype: torch.dtype
) -> None:
    logits = torch.zeros(1, vocabulary)
    logits[0, 1] = margin
    logits = logits.to(dtype)
    scalars = make_case(0, logits=logits).rows.scalars
    state = cpu.statistics(logits, None, torch.tensor([1]), scalars, 0.0, ENTROPY_NONE)
    grad, slopes = gradient_buffer(logits), torch.tensor([[1.0], [0.0], [0.0]])
    cpu.apply(logits, None, torch.tensor([1]), state, slopes, scalars, 0.0, grad)
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
    losses, tokens, grad = case.loss(cpu)
    assert losses[1].isnan()
    assert tokens[0, 1].isnan()
    assert grad[1].isnan().any()
    others = [0, 2, 3]
    assert losses[others].isfinite().all()
    assert grad[others].isfinite().all()


def test_a_nan_advantage_reaches_its_own_gradient_only_whatever_its_bits(isa: str) -> None:
    case = make_case(12, (4,), 40, torch.bfloat16, dead=0.0)
    case.rows.values[0, 2] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    grad = case.loss(cpu)[2]
    assert grad[2].isnan().all()
    assert grad[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("bad", [-1, 100, -99, 2**40])
def test_ids_out_of_range_raise_before_anything_is_written(isa: str, bad: int) -> None:
    case = make_case(13, (5,), 100, dead=0.0)
    case.rows.ids[4] = bad
    before, rows = case.logits.clone(), case.rows
    state, slopes = torch.zeros(7, 5), torch.zeros(3, 5)
    message = rf"token_ids of live rows must be in \[0, 100\) or -100; got {bad}"
    with pytest.raises(IndexError, match=message):
        cpu.fused(case.logits, None, rows, case.logits)
    with pytest.raises(IndexError, match=message):
        cpu.statistics(case.logits, None, rows.ids, rows.scalars, 0.0, ENTROPY_NONE)
    with pytest.raises(IndexError, match=message):
        cpu.apply(case.logits, None, rows.ids, state, slopes, rows.scalars, 0.0, case.logits)
    assert torch.equal(case.logits, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, threads: None, dtype: torch.dtype) -> None:
    code = Code(COST_GIVEN, KL_FULL, True, False, False)
    case = make_case(14, (40,), 20_000, dtype, code, 0.0, ENTROPY_GRADIENT, entropy_coef=0.1, **OPTIONS)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(case.loss(cpu))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)
    row = int(case.live.nonzero()[3])
    rows = replace(case.rows, ids=case.rows.ids[row : row + 1], values=case.rows.values[:, row : row + 1].contiguous())
    alone = Case(case.logits[row : row + 1], case.ref_logits[row : row + 1], rows).loss(cpu)
    assert torch.equal(alone[0][0], results[0][0][row])
    assert torch.equal(alone[2][0], results[0][2][row])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(threads: None) -> None:
    case = make_case(17, (40,), 20_000)
    rows = case.rows
    torch.set_num_threads(2)
    state = cpu.statistics(case.logits, None, rows.ids, rows.scalars, 0.0, ENTROPY_NONE)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for its parent's threads waits for ever
        again = cpu.statistics(case.logits, None, rows.ids, rows.scalars, 0.0, ENTROPY_NONE)
        os._exit(0 if torch.equal(state, again) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "expanded", "strided"])
def test_rows_are_scaled_with_one_rounding_and_those_times_one_are_left(
    isa: str, kind: str, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(15)
    grad = torch.randn(3, 5, 67, generator=g).to(dtype)[:, :, 1:]
    upstream = {
        "contiguous": torch.randn(15, generator=g),
        "expanded": torch.tensor(0.3).expand(15),
        "strided": torch.randn(30, generator=g)[::2],
    }[kind]
    if kind == "contiguous":
        upstream[4] = 1
    expected = (grad.float() * upstream.view(3, 5, 1)).to(dtype)
    cpu.scale_rows(grad, upstream)
    assert torch.equal(grad, expected)
    nan = torch.full((2, 9), math.nan).to(dtype)
    cpu.scale_rows(nan, torch.tensor([1.0, 2.0]))
    assert nan.isnan().all()


def test_no_gradient_is_written_where_none_is_wanted(isa: str) -> None:
    case = make_case(16)
    before = case.logits.clone()
    losses, tokens = cpu.fused(case.logits, None, case.rows, None)
    assert torch.equal(case.logits, before)
    for mine, theirs in zip((losses, tokens), case.loss(cpu), strict=False):
        assert torch.equal(mine, theirs)


def test_sixteen_bit_types_round_to_nearest(isa: str) -> None:
    """Every bfloat16 and float16 times a factor, NaN and subnormal numbers included, by scale_rows."""
    for dtype in (torch.bfloat16, torch.float16):
        everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for factor in (1.1, 0.37, 2.0**-8, 3e4):
            row = everything.clone()[None]
            cpu.scale_rows(row, torch.tensor([factor]))
            expected = (everything.float() * torch.tensor(factor)).to(dtype)
            assert torch.equal(row[0].isnan(), expected.isnan())
            assert torch.equal(row[0].nan_to_num(0), expected.nan_to_num(0))


def test_exp2_is_accurate_to_a_quarter_of_a_millionth(isa: str) -> None:
    t = torch.cat((torch.linspace(-126.4, 1.0, 4_000_001), torch.linspace(-1.0, 0.0, 4_000_001)))
    out = torch.empty_like(t)
    _cpu._exp2(t, out)
    exact = torch.exp2(t.double())
    assert ((out.double() - exact).abs() / exact).max() <= 2.5e-7
    whole = torch.arange(-126.0, 1.0)
    out = torch.empty_like(whole)
    _cpu._exp2(whole, out)
    assert torch.equal(out, torch.exp2(whole))
    special = torch.tensor([-INF, -1e30, -128.0, math.nan])
    out = torch.empty_like(special)
    _cpu._exp2(special, out)
    assert not out[:3].any()
    assert out[3].isnan()


@pytest.mark.parametrize("cap", [1.0, 5.0, 30.0])
def test_the_softcap_and_its_slope_are_accurate_where_they_are_small(isa: str, cap: float) -> None:
    magnitude = torch.logspace(-10, 2.2, 1_000_001)
    z = torch.cat((magnitude, -magnitude, torch.zeros(1)))
    value, slope = torch.empty_like(z), torch.empty_like(z)
    _cpu._soft_cap(z, value, slope, cap)
    x = z.double() / cap
    exact, exact_slope = cap * torch.tanh(x), 1 / torch.cosh(x) ** 2
    assert ((value - exact).abs() <= 2e-6 * exact.abs()).all()
    kept = exact_slope > 1e-36
    assert ((slope - exact_slope).abs() <= 3e-5 * exact_slope)[kept].all()
    special = torch.tensor([INF, -INF, math.nan])
    value, slope = torch.empty_like(special), torch.empty_like(special)
    _cpu._soft_cap(special, value, slope, cap)
    assert torch.equal(value[:2], torch.tensor([cap, -cap]))
    assert value[2].isnan()
    assert not slope[:2].any()
