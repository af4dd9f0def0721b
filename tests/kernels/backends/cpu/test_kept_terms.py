"""What the C++ kernels keep of a row between its two passes: maxima that rise, blocks that vanish, ties, long rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repo_kernels.backends import cpu
from repo_kernels.backends.codes import ENTROPY_GRADIENT, ENTROPY_NONE, KL_FULL, KL_K3
from tests.support.kernels.cpu_rows import DTYPES, GRADIENT_TOLERANCE, OPTIONS, check
from tests.support.kernels.row_cases import Case, flat, make_case, make_code, oracle, relative

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built"),
    pytest.mark.pairwise,
]

INF = math.inf
BLOCK, COLUMNS = 2048, 5 * 2048 + 777  # 1024 in the generic kernels
LONGEST = 1 << 18  # columns of a row whose terms are kept
TERMS = {"plain": (KL_K3, 0.0), "entropy": (KL_K3, 0.1), "KL": (KL_FULL, 0.0), "both": (KL_FULL, 0.1)}


def case_of(logits: Tensor, terms: str, ref_logits: Tensor | None = None, **options: float) -> Case:
    """Live rows of these logits whose loss has the terms."""
    kl, alpha = TERMS[terms]
    arguments = {"entropy_coef": alpha, **OPTIONS, **options}
    entropy = ENTROPY_GRADIENT if alpha else ENTROPY_NONE
    code = make_code(kl=kl)
    return make_case(0, logits=logits, ref_logits=ref_logits, code=code, entropy=entropy, dead=0.0, **arguments)


def with_peaks(dtype: torch.dtype, at: list[int], heights: list[float], seed: int = 0) -> Tensor:
    """(3, COLUMNS) random logits with peaks in these columns."""
    logits = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(seed))
    logits[:, at] = torch.tensor(heights)
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("softcap", [0.0, 20.0], ids=["", "softcap"])
@pytest.mark.parametrize(
    "last", [COLUMNS - 1, 5 * BLOCK, 5 * BLOCK - 1], ids=["last column", "last block", "before it"]
)
def test_a_maximum_may_be_beaten_to_the_last_column(
    isa: str, last: int, softcap: float, terms: str, dtype: torch.dtype
) -> None:
    logits = with_peaks(dtype, [5, BLOCK, 3 * BLOCK + 100, last], [3.0, 7.0, 9.0, 12.0])
    scale = 4096.0 if dtype == torch.float16 else 1.0  # out of the subnormal numbers
    kl, alpha = TERMS[terms]
    case = make_case(
        1, logits=logits, code=make_code(kl=kl), softcap=softcap, entropy=ENTROPY_GRADIENT if alpha else ENTROPY_NONE,
        dead=0.0, grad_scale=scale, entropy_coef=alpha, **OPTIONS,
    )  # fmt: skip
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_maxima_of_logits_and_reference_may_rise_in_different_blocks(isa: str, dtype: torch.dtype) -> None:
    logits = with_peaks(dtype, [BLOCK + 1, 4 * BLOCK], [6.0, 9.0])
    reference = with_peaks(dtype, [3, 2 * BLOCK, 5 * BLOCK + 9], [5.0, 8.0, 11.0], seed=1)
    check(case_of(logits, "both", reference, grad_scale=4096.0 if dtype == torch.float16 else 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("low", [-INF, -3e4, -400.0], ids=str)
def test_blocks_without_probability_have_no_gradient_even_where_the_reference_is_impossible(
    isa: str, low: float, terms: str, dtype: torch.dtype
) -> None:
    logits, reference = with_peaks(dtype, [0], [0.0]), with_peaks(dtype, [0], [0.0], seed=1)
    logits[:, : 3 * BLOCK], reference[:, : 3 * BLOCK] = low, -INF
    case = case_of(logits, terms, reference, grad_scale=256.0)
    case = case.replace(token_ids=torch.tensor([3 * BLOCK, 3 * BLOCK + 1, COLUMNS - 1]))
    losses, tokens, grad = case.run(cpu)
    assert losses.isfinite().all()
    assert tokens.isfinite().all()
    assert grad.isfinite().all()
    assert not grad[:, : 3 * BLOCK].any()
    alone = replace(
        case.replace(token_ids=case.ids - 3 * BLOCK),
        logits=logits[:, 3 * BLOCK :],
        ref_logits=reference[:, 3 * BLOCK :],
    )
    assert relative(grad[:, 3 * BLOCK :], oracle(alone).grad) <= GRADIENT_TOLERANCE[dtype]
    for mine, inplace in zip((losses, tokens, grad), case.run(cpu, inplace=True), strict=True):
        assert torch.equal(mine, inplace)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("poison", [math.nan, -math.nan, INF])
@pytest.mark.parametrize("column", [7, 2 * BLOCK, COLUMNS - 1])
def test_nan_reaches_the_whole_gradient_of_its_row_and_no_other(
    isa: str, column: int, poison: float, terms: str, dtype: torch.dtype
) -> None:
    logits = with_peaks(dtype, [3 * BLOCK], [9.0])
    logits[1, column] = poison
    losses, tokens, grad = case_of(logits, terms, logits.clone()).run(cpu)
    assert losses[1].isnan()
    assert tokens[0, 1].isnan()
    assert grad[1].isnan().all()
    assert losses[[0, 2]].isfinite().all()
    assert grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("value", [3.0, 0.0, -0.0, -7.0])
@pytest.mark.parametrize("vocabulary", [2, 33, BLOCK, COLUMNS])
def test_equal_logits_have_equal_probabilities(
    isa: str, vocabulary: int, value: float, terms: str, dtype: torch.dtype
) -> None:
    logits = torch.full((2, vocabulary), value, dtype=dtype)
    reference = torch.full((2, vocabulary), 1.0, dtype=dtype)
    case = case_of(logits, terms, reference, grad_scale=float(vocabulary))
    tokens, grad = case.run(cpu)[1:]
    assert torch.allclose(tokens[0].double(), torch.full((2,), -math.log(vocabulary), dtype=torch.float64), rtol=1e-7)
    if TERMS[terms][0] == KL_FULL:
        assert tokens[2].abs().max() <= 2e-7
    assert relative(grad, oracle(case).grad) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
def test_the_maximum_is_found_among_logits_of_any_sign(isa: str, shift: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = (3 * torch.randn(4, COLUMNS, generator=generator) + shift).to(dtype)
    ids = logits.float().argmax(-1)
    case = case_of(logits, "plain", temperature=0.01).replace(token_ids=ids)  # p of the maximum is nearly 1
    assert torch.allclose(case.run(cpu)[1][0].double(), case_logps(case), rtol=1e-5, atol=1e-7)


def case_logps(case: Case) -> Tensor:
    """(N,) log-probabilities of the tokens in float64."""
    logps = torch.log_softmax(flat(case.logits).double() / case.temperature.double(), -1)
    return logps.gather(-1, case.ids[:, None])[:, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", ["plain", "both"])
@pytest.mark.parametrize("offset", range(0, 40, 3))
def test_a_row_may_begin_anywhere_in_a_line(isa: str, offset: int, terms: str, dtype: torch.dtype) -> None:
    rising = torch.linspace(-8, 8, COLUMNS + 64).repeat(2, 1).to(dtype)
    case = case_of(rising[:, offset : offset + COLUMNS], terms, rising.flip(0)[:, offset : offset + COLUMNS])
    copy = replace(case, logits=case.logits.contiguous(), ref_logits=case.ref_logits.contiguous())
    for of_view, of_copy in zip(case.run(cpu), copy.run(cpu), strict=True):
        assert torch.equal(of_view, of_copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("columns", [LONGEST, LONGEST + 1])
def test_terms_are_kept_of_rows_up_to_a_length_and_computed_again_beyond_it(
    isa: str, columns: int, terms: str, dtype: torch.dtype
) -> None:
    logits = (2 * torch.randn(2, columns, generator=torch.Generator().manual_seed(3))).to(dtype)
    check(case_of(logits, terms, grad_scale=2.0**14 if dtype == torch.float16 else 1.0))


def test_a_longer_row_after_a_shorter_one_has_memory_for_its_terms(isa: str) -> None:
    for columns in (10, 4000, 9, 50_000, 100):
        check(case_of(torch.randn(2, columns, generator=torch.Generator().manual_seed(columns)), "both"))
