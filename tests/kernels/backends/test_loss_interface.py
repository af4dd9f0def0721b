"""The functions of a backend's loss by themselves: aggregation weights, bounds, ranges of rows, narrower gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels.backends import choice
from repo_kernels.backends.codes import (
    AGGREGATIONS,
    ENTROPY_GRADIENT,
    IGNORED,
    KL_FULL,
    KL_K3,
    NO_AGGREGATION,
    ROWS,
    SEQ_TOKEN_MEAN,
    STATS,
    TOKEN_SUM,
)
from repo_kernels.backends.interface import Loss, RowRange, RowResults
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.row_cases import Case, exact_weights, flat, make_case, make_code, oracle, relative, unwritten

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

OPTIONS = {"lam": 0.7, "beta": 0.3, "entropy_coef": 0.1, "dual_clip": 2.0, "temperature": 0.9}
LEADING = {"packed": (13,), "padded": (3, 5)}


def case_of(layout: str, seed: int = 1, vocabulary: int = 41, dtype: torch.dtype = torch.float32, **code: Any) -> Case:
    options = {"entropy": ENTROPY_GRADIENT, "softcap": 6.0, **OPTIONS}
    return make_case(seed, LEADING[layout], vocabulary, dtype, make_code(**code), **options)


def parts(name: str, case: Case) -> tuple[RowResults, Tensor, Tensor, Tensor]:
    """Results, gradient (N, V), loss and statistics by prepare, fused and reduce."""
    kernels, grad = choice.load(name), gradient_buffer(case.logits).fill_(math.nan)
    results, prepared = unwritten(case.logits, case.ids.numel()), kernels.prepare(case.logits, case.loss)
    kernels.fused(case.logits, case.reference, case.loss, prepared, results, grad)
    return results, flat(grad), *kernels.reduce(case.loss, prepared, results)


@pytest.mark.parametrize("divisor", [False, True], ids=["counts", "divisor"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("layout", LEADING)
def test_weights_are_those_of_their_closed_form_and_of_the_eager_backend(
    layout: str, aggregation: str, divisor: bool, backend: str
) -> None:
    mode = AGGREGATIONS.index(aggregation)
    divisor = divisor and mode not in (TOKEN_SUM, NO_AGGREGATION)
    case = case_of(layout, aggregation=mode, divisor=divisor)
    weights, plain = exact_weights(case), case_of(layout, aggregation=NO_AGGREGATION, divisor=False)
    results, grad, loss, stats = parts(backend, case)
    by_token, unweighted, _, plain_stats = parts(backend, plain)
    torch.testing.assert_close(results.rows[0].double(), weights * by_token.rows[0].double(), rtol=3e-7, atol=0)
    assert relative(grad, weights[:, None] * unweighted.double()) <= 1e-6
    torch.testing.assert_close(loss.double(), (weights * by_token.rows[0].double()).sum(), rtol=1e-6, atol=1e-7)
    assert torch.equal(stats, plain_stats)
    assert results.rows[1:].equal(by_token.rows[1:])
    expected = oracle(case)
    assert relative(results.rows[0], expected.losses) <= 4e-6
    assert relative(grad, expected.grad) <= 5e-6
    eager, eager_grad, eager_loss, eager_stats = parts("eager", case)
    torch.testing.assert_close(results.rows[0], eager.rows[0], rtol=1e-5, atol=1e-6)
    assert results.flags.equal(eager.flags)
    assert relative(grad, eager_grad) <= 1e-5
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats, eager_stats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl", [KL_K3, KL_FULL])
@pytest.mark.parametrize("layout", LEADING)
def test_the_whole_is_its_parts(layout: str, kl: int, backend: str) -> None:
    case, kernels = case_of(layout, kl=kl), choice.load(backend)
    expected, expected_grad, expected_loss, expected_stats = parts(backend, case)
    for zeroed in (False, True):
        grad = gradient_buffer(case.logits).fill_(0.0 if zeroed else math.nan)
        loss, stats, results = kernels.whole(case.logits, case.reference, case.loss, grad, zeroed)
        assert torch.equal(flat(grad), expected_grad)
        assert (loss.shape, stats.shape) == ((), (len(STATS),))
        assert torch.equal(loss, expected_loss)
        assert torch.equal(stats, expected_stats)
        assert results.rows.equal(expected.rows)
        assert results.flags.equal(expected.flags)
    *_, forward = kernels.whole(case.logits, case.reference, case.loss, None)
    assert forward.rows.equal(expected.rows)


BOUNDS = {
    "dead head and tail": ([2, 5, 5, 9], 2, 9),
    "dead tail": ([0, 4, 11], 0, 11),
    "dead head": ([6, 13], 6, 13),
    "one sequence of none": ([7, 7], 7, 7),
    "no sequence": ([0], 0, 0),
    "bounds beyond the rows": ([0, 4, 99], 0, 13),
    "sequences beyond the rows": ([0, 13, 20, 30], 0, 13),
}


@pytest.mark.parametrize("aggregation", [SEQ_TOKEN_MEAN, 0, 3, 4, NO_AGGREGATION])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_rows_outside_the_bounds_are_dead(bounds: str, aggregation: int, backend: str) -> None:
    given, first, last = BOUNDS[bounds]
    divided = aggregation != NO_AGGREGATION
    case = case_of("packed", aggregation=aggregation, divisor=False).replace(
        cu_seqlens=torch.tensor(given, dtype=torch.int32)
    )
    outside = torch.ones(13, dtype=torch.bool)
    outside[first:last] = False
    # what a value by sequence holds must not be looked up for a row without a sequence
    by_sequence = torch.linspace(-1, 1, len(given) - 1)
    case = case.replace(costs=by_sequence, reward_advantages=by_sequence.flip(0))
    case.logits[outside] = math.nan
    results, grad, loss, stats = parts(backend, case)
    assert not results.rows[:, outside].any()
    assert not results.flags[outside].any()
    assert not grad[outside].any()
    # the same rows, dead by their ids, in sequences that end with the rows
    closed = torch.tensor([0, *(min(bound, 13) for bound in given[1:-1]), 13], dtype=torch.int32)
    same = case.replace(token_ids=case.ids.masked_fill(outside, IGNORED), cu_seqlens=closed) if len(given) > 1 else None
    if same is not None:
        expected, expected_grad, expected_loss, expected_stats = parts(backend, same)
        assert results.rows.equal(expected.rows)
        assert results.flags.equal(expected.flags)
        assert grad.equal(expected_grad)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(stats, expected_stats, rtol=1e-6, atol=1e-6)
    eager, eager_grad, eager_loss, eager_stats = parts("eager", case)
    torch.testing.assert_close(results.rows, eager.rows, rtol=1e-5, atol=1e-6)
    assert results.flags.equal(eager.flags)
    assert relative(grad, eager_grad) <= 1e-5 or not eager_grad.any()
    torch.testing.assert_close(loss, eager_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats, eager_stats, rtol=1e-5, atol=1e-5)
    assert divided or results.rows[0].count_nonzero() <= last - first


@pytest.mark.parametrize("kl", [KL_K3, KL_FULL])
@pytest.mark.parametrize("layout", LEADING)
@pytest.mark.parametrize("where", ["first", "index", "whole index"])
def test_some_rows_of_a_loss_are_those_of_the_whole(where: str, layout: str, kl: int, backend: str) -> None:
    # rows that all begin at 16-byte boundaries: the bits of a row depend on how it lies in memory
    case, kernels = case_of(layout, vocabulary=40, kl=kl), choice.load(backend)
    whole, whole_grad, loss, stats = parts(backend, case)
    count = case.ids.numel()
    live = case.live.nonzero().squeeze(1)
    chunks = {
        "first": [(RowRange(start), torch.arange(start, min(start + 4, count))) for start in range(0, count, 4)],
        "index": [(RowRange(index=rows.contiguous()), rows) for rows in live.flip(0).split(3)],
        "whole index": [(RowRange(index=live), live)],
    }[where]
    prepared = kernels.prepare(case.logits, case.loss)
    results = RowResults.allocate(case.logits, count, zeros=True)
    logits, reference = flat(case.logits), None if case.reference is None else flat(case.reference)
    for range_, rows in chunks:
        part = None if reference is None else reference[rows]
        grad = torch.full_like(logits[rows], math.nan)
        kernels.fused(logits[rows], part, case.loss, prepared, results, grad, range_)
        assert torch.equal(grad, whole_grad[rows])
    assert results.rows.equal(whole.rows)
    assert results.flags.equal(whole.flags)
    again, again_stats = kernels.reduce(case.loss, prepared, results)
    assert torch.equal(again, loss)
    assert torch.equal(again_stats, stats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dense", "strided", "expanded"])
@pytest.mark.parametrize("where", ["all", "first", "index"])
def test_an_upstream_gradient_multiplies_the_gradient_of_each_row_before_it_is_rounded(
    where: str, kind: str, dtype: torch.dtype, backend: str
) -> None:
    case, kernels = case_of("packed", vocabulary=40, dtype=dtype), choice.load(backend)
    g = torch.Generator().manual_seed(5)
    upstream = {
        "dense": torch.randn(13, generator=g),
        "strided": torch.randn(26, generator=g)[::2],
        "expanded": torch.tensor(0.3).expand(13),
    }[kind]
    rows = {"all": torch.arange(13), "first": torch.arange(4, 11), "index": torch.tensor([12, 3, 5])}[where]
    range_ = {"all": RowRange(), "first": RowRange(4), "index": RowRange(index=rows)}[where]
    prepared, results = kernels.prepare(case.logits, case.loss), unwritten(case.logits, 13)
    logits = case.logits[rows]
    grad = torch.full_like(logits, math.nan)
    kernels.fused(logits, None, case.loss, prepared, results, grad, range_, upstream)
    expected = oracle(case).grad[rows] * upstream.double()[rows, None]
    assert relative(grad, expected) <= {torch.float32: 5e-6, torch.bfloat16: 4e-3}[dtype]
    assert results.rows[:, rows].equal(parts(backend, case)[0].rows[:, rows])  # the losses are not multiplied


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kl", [KL_K3, KL_FULL])
@pytest.mark.parametrize(("vocabulary", "stride", "offset"), [(48, 48, 0), (37, 48, 0), (41, 41, 3), (600, 608, 0)])
def test_a_narrower_gradient_is_the_fp32_one_rounded_once(
    vocabulary: int, stride: int, offset: int, kl: int, narrow: torch.dtype, backend: str
) -> None:
    if backend == "cpu":
        pytest.skip("its GEMMs take fp32")
    case, kernels = case_of("packed", vocabulary=vocabulary, kl=kl), choice.load(backend)
    case = case.replace(grad_scale=64.0)
    expected = parts(backend, case)[1]
    prepared, results = kernels.prepare(case.logits, case.loss), unwritten(case.logits, 13)
    storage = torch.full((offset + 13 * stride,), math.nan, dtype=narrow)
    grad = storage.as_strided((13, vocabulary), (stride, 1), offset)
    kernels.fused(case.logits, case.reference, case.loss, prepared, results, grad)
    if vocabulary < 100:
        assert torch.equal(grad, expected.to(narrow))
    else:  # pieces of more columns are added in another order: half a unit in the last place, and fp32's error
        unit = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[narrow]
        error, size = (grad.double() - expected.double()).abs(), expected.double().abs()
        assert (error <= unit * size + 1e-5 * size + 2.0**-25).all()
    assert storage.isnan().sum() == offset + 13 * (stride - vocabulary)
    if kl == KL_FULL:
        return
    state = kernels.statistics(case.logits, case.ids, case.temperature, case.loss.softcap, case.loss.entropy)
    slopes, wide = oracle(case).slopes.float(), torch.full_like(case.logits, math.nan)
    kernels.apply(case.logits, case.ids, state, slopes, case.temperature, case.loss.softcap, wide)
    grad.fill_(math.nan)
    kernels.apply(case.logits, case.ids, state, slopes, case.temperature, case.loss.softcap, grad)
    assert torch.equal(grad, wide.to(narrow))


@pytest.mark.parametrize("given", ["numbers", "vector", "0-d tensors", "0-d tensors of fp64", "a mixture"])
def test_scalars_are_numbers_or_tensors(given: str, backend: str) -> None:
    case = case_of("packed", aggregation=4)  # by divisor and max_length too
    numbers = case.loss.scalars
    tensors = [torch.tensor(number, requires_grad=True) for number in numbers]
    scalars = {
        "numbers": numbers,
        "vector": torch.tensor(numbers),
        "0-d tensors": tuple(tensors),
        "0-d tensors of fp64": tuple(tensor.double() for tensor in tensors),
        "a mixture": tuple(t if i % 2 else n for i, (n, t) in enumerate(zip(numbers, tensors, strict=True))),
    }[given]
    other = Case(case.logits, case.ref_logits, replace(case.loss, scalars=scalars))
    (expected, *rest), (results, *others) = parts(backend, case), parts(backend, other)
    assert results.rows.equal(expected.rows)
    for mine, theirs in zip(others, rest, strict=True):
        assert torch.equal(mine, theirs)


def test_codes_survive_packing() -> None:
    from repo_kernels.backends.codes import Code

    assert len(ROWS) == 5
    for number in range(1 << 12):
        code = Code.unpack(number)
        if code.cost < 4 and code.kl < 5 and code.aggregation < 6:
            assert Code.unpack(code.pack()) == code
            assert code.pack() == number
            loss = Loss(None, (), number, 0.0, 0)  # type: ignore[arg-type]
            assert loss.per_token == (code.aggregation == NO_AGGREGATION)
