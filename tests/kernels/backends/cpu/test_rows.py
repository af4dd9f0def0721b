"""The C++ backend's functions over rows, on every instruction set of this machine, against float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from repo_kernels.backends import cpu
from repo_kernels.backends.codes import (
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
    KL_NONE,
    Code,
)
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.cpu_rows import DTYPES, GRADIENT_TOLERANCE, OPTIONS, check
from tests.support.kernels.row_cases import flat, make_case, make_code, oracle, relative

pytestmark = [
    pytest.mark.skipif(not cpu.available(), reason="the C++ extension was not built"),
    pytest.mark.pairwise,
]

INF = math.inf
CODES = [
    make_code(cost, kl, kl_importance_weighted, normalize, on_policy)
    for (cost, kl, kl_importance_weighted), (normalize, on_policy) in zip(
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
        code = make_code(kl=kl)
        case = make_case(seed, (11,), vocabulary, dtype, code, 0.0, ENTROPY_GRADIENT, scale=1.0, **arguments)
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_temperature_for_each_row_agrees_with_float64(isa: str, dtype: torch.dtype) -> None:
    arguments = {"entropy_coef": 0.1, "grad_scale": 64.0, **OPTIONS}
    case = make_case(6, (3, 9), 333, dtype, make_code(kl=KL_FULL), 5.0, ENTROPY_GRADIENT, **arguments)
    by = torch.linspace(0.5, 2.0, 27).masked_fill(~case.live, math.nan).view(3, 9)
    check(case.replace(temperatures=by.t().contiguous().t()))
    sequences = torch.tensor([0.6, 1.0, 1.7])
    by_sequence = case.replace(temperatures=sequences).run(cpu)
    by_row = case.replace(temperatures=sequences[:, None].expand(3, 9)).run(cpu)
    assert all(torch.equal(one, other) for one, other in zip(by_sequence, by_row, strict=True))


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
    code = make_code(kl=KL_FULL)
    case = make_case(3, logits=logits, code=code, entropy=ENTROPY_GRADIENT, entropy_coef=0.1, **OPTIONS)
    copy = replace(case, logits=logits.contiguous())
    for of_view, of_copy in zip(case.run(cpu), copy.run(cpu), strict=True):
        assert torch.equal(of_view, of_copy)
    if logits.numel():
        assert relative(case.run(cpu)[2], oracle(case).grad) <= GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl", [KL_NONE, KL_K3])
def test_two_steps_are_the_fused_loss(isa: str, kl: int, dtype: torch.dtype) -> None:
    arguments = {"entropy_coef": 0.1, "grad_scale": 8.0, **OPTIONS}
    case = make_case(4, (3, 8), 777, dtype, make_code(kl=kl), 7.0, ENTROPY_GRADIENT, **arguments)
    _, tokens, grad = case.run(cpu)
    state = cpu.statistics(case.logits, case.ids, case.temperature, case.loss.softcap, case.loss.entropy)
    assert torch.equal(state[:2], tokens[:2])
    assert not state[:, ~case.live].any()

    slopes = oracle(case).slopes.float()
    slopes[:, ~case.live] = math.nan
    out = gradient_buffer(case.logits).fill_(math.nan)
    cpu.apply(case.logits, case.ids, state, slopes, case.temperature, case.loss.softcap, out)
    assert relative(flat(out), grad) <= (1e-6 if dtype == torch.float32 else GRADIENT_TOLERANCE[dtype])
