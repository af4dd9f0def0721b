"""The C++ kernels' own functions: exponential, softcap, rounding, scaling; and their threads."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from repo_kernels.backends import cpu
from repo_kernels.backends.codes import ENTROPY_GRADIENT, ENTROPY_NONE, KL_FULL, TOKEN_MEAN
from tests.support.kernels.cpu_rows import DTYPES, OPTIONS
from tests.support.kernels.row_cases import make_case, make_code, token_values

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built"),
    pytest.mark.pairwise,
]

if cpu.available():
    from repo_kernels import _cpu

INF = math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_neighbours(isa: str, threads: None, dtype: torch.dtype) -> None:
    code = make_code(kl=KL_FULL, aggregation=TOKEN_MEAN)
    case = make_case(14, (40,), 20_000, dtype, code, 0.0, ENTROPY_GRADIENT, entropy_coef=0.1, **OPTIONS)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        results.append(case.run(cpu))
    for other in results[1:]:
        for mine, theirs in zip(results[0], other, strict=True):
            assert torch.equal(mine, theirs)
    row = int(case.live.nonzero()[3])
    alone = case.of_rows(row, row + 1).run(cpu)
    assert torch.equal(alone[0][0], results[0][0][row])
    assert torch.equal(alone[2][0], results[0][2][row])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own(threads: None) -> None:
    case = make_case(17, (40,), 20_000)
    torch.set_num_threads(2)
    state = cpu.statistics(case.logits, case.ids, case.temperature, 0.0, ENTROPY_NONE)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that waits for its parent's threads waits for ever
        again = cpu.statistics(case.logits, case.ids, case.temperature, 0.0, ENTROPY_NONE)
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
    cpu.scale_rows(grad, upstream, None)
    assert torch.equal(grad, expected)
    nan = torch.full((2, 9), math.nan).to(dtype)
    cpu.scale_rows(nan, torch.tensor([1.0, 2.0]), None)
    assert nan.isnan().all()
    dead = torch.zeros(2, 9, dtype=dtype)
    cpu.scale_rows(dead, torch.tensor([INF, math.nan]), torch.zeros(2, dtype=torch.int32))
    assert not dead.any()


def test_no_gradient_is_written_where_none_is_wanted(isa: str) -> None:
    case = make_case(16)
    before = case.logits.clone()
    results = case.into(cpu, case.logits, None)
    assert torch.equal(case.logits, before)
    for mine, theirs in zip((results.rows[0], token_values(results)), case.run(cpu), strict=False):
        assert torch.equal(mine, theirs)


def test_sixteen_bit_types_round_to_nearest(isa: str) -> None:
    """Every bfloat16 and float16 times a factor, NaN and subnormal numbers included, by scale_rows."""
    for dtype in (torch.bfloat16, torch.float16):
        everything = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for factor in (1.1, 0.37, 2.0**-8, 3e4):
            row = everything.clone()[None]
            cpu.scale_rows(row, torch.tensor([factor]), None)
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
    assert not out[:2].any()
    assert out[2] in (0, 2.0**-128)
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
