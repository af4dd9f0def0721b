"""Products with a rank for one dimension: those of fp64, for every edge, stride, instruction set and thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo_kernels.backends.cpu import layers as cpu
from repo_kernels.losses.heads import gemm

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ backend was not built"),
    pytest.mark.usefixtures("isa"),
]
ROWS = st.one_of(st.integers(0, 20), st.sampled_from([31, 64, 129]))
COLUMNS = st.one_of(st.integers(0, 140), st.sampled_from([255, 256, 257, 512, 1031]))
RANKS = st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 33, 64, 65, 131]))


def in_threads(threads, call):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        call()
    finally:
        torch.set_num_threads(before)


def within_rounding(found, sums, magnitudes, terms):
    """An fp32 sum of so many terms is off by at most that many roundings of the sum of their magnitudes."""
    assert bool(((found - sums).abs() <= (terms + 2) * 2**-24 * magnitudes).all())


@settings(deadline=None, max_examples=80)
@given(ROWS, COLUMNS, RANKS, st.integers(0, 5), st.integers(1, 3))
def test_products_are_those_of_fp64_and_leave_the_rest_of_the_rows(rows, columns, rank, apart, threads):
    torch.manual_seed(0)
    wide = torch.randn(rows, columns + apart)
    z, b, start, before = torch.randn(rows, rank), torch.randn(columns, rank), torch.randn(columns, rank), wide.clone()

    inner = start.clone()
    in_threads(threads, lambda: cpu.add_inner(wide[:, :columns], z, inner))
    d, zd = wide[:, :columns].double(), z.double()
    within_rounding(inner, start + d.t() @ zd, start.abs() + d.abs().t() @ zd.abs(), rows)
    assert torch.equal(wide, before)

    in_threads(threads, lambda: cpu.add_outer(z, b, wide[:, :columns]))
    sums, magnitudes = d + zd @ b.double().t(), d.abs() + zd.abs() @ b.double().abs().t()
    within_rounding(wide[:, :columns], sums, magnitudes, rank)
    assert torch.equal(wide[:, columns:], before[:, columns:])


def test_the_bits_do_not_depend_on_the_threads():
    torch.manual_seed(1)
    d, z, b = torch.randn(64, 5000), torch.randn(64, 16), torch.randn(5000, 16)
    found = []
    for threads in (1, 2, 5):
        out, inner = d.clone(), torch.zeros(5000, 16)
        in_threads(threads, lambda out=out, inner=inner: (cpu.add_outer(z, b, out), cpu.add_inner(d, z, inner)))
        found.append((out, inner))
    assert all(torch.equal(x, y) for one in found[1:] for x, y in zip(one, found[0], strict=True))


def test_infinities_and_nan_stay_in_their_entries():
    z, b, out = torch.ones(3, 2), torch.ones(40, 2), torch.zeros(3, 40)
    out[1, 7], b[39, 0] = float("nan"), float("inf")
    cpu.add_outer(z, b, out)
    assert out[1, 7].isnan()
    assert bool((out[:, 39] == float("inf")).all())
    assert int(out.isfinite().sum()) == 3 * 39 - 1
    inner = torch.zeros(40, 2)
    cpu.add_inner(out, z, inner)
    assert bool(inner[7].isnan().all())
    assert bool((inner[39] == float("inf")).all())
    assert int(inner.isfinite().sum()) == 2 * 38


def test_memory_that_does_not_fit_is_refused():
    z, b, out = torch.ones(3, 2), torch.ones(40, 2), torch.ones(3, 40)
    for wrong, message in (
        ((out, z[:2], b), "z must have a row for each row of out"),
        ((out, z, b[:39]), "b must have a row for each column of out"),
        ((out, z, torch.ones(40, 3)), "b must have a row for each column of out"),
        ((out.t(), torch.ones(40, 2), torch.ones(3, 2)), "the columns of a row must be consecutive"),
        ((out[:1].expand(3, 40), z, b), "rows must not overlap"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu._cpu.add_outer(*wrong, 1)
    with pytest.raises(ValueError, match="out must have a row for each column of d"):
        cpu._cpu.add_inner(out, z, torch.ones(39, 2), 1)
    with pytest.raises(TypeError):
        cpu._cpu.add_outer(out.double(), z, b, 1)


@pytest.mark.parametrize("rank", [1, gemm.THIN_RANK, gemm.THIN_RANK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_losses_take_them_up_to_a_rank_and_a_gemm_beyond(rank, dtype, monkeypatch):
    torch.manual_seed(2)
    z, b, out, inner = (torch.randn(*s, dtype=dtype) for s in ((5, rank), (70, rank), (5, 70), (70, rank)))
    expected = out.double() + z.double() @ b.double().t(), inner.double() + out.double().t() @ z.double()
    calls = []
    for name in ("add_outer", "add_inner"):
        kernel = getattr(cpu, name)
        monkeypatch.setattr(gemm.cpu, name, lambda *a, kernel=kernel, name=name: (calls.append(name), kernel(*a)))
    gemm.add_inner(out, z, inner)
    gemm.add_outer(z, b, out)
    assert torch.allclose(out.double(), expected[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(inner.double(), expected[1], rtol=1e-4, atol=1e-4)
    passes = rank <= gemm.THIN_RANK and dtype == torch.float32
    assert calls == (["add_inner", "add_outer"] if passes else [])
