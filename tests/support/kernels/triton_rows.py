"""Rows for the Triton kernels, with blocks so small that short rows have several, and their check against float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from repo_kernels.backends import codes
from repo_kernels.backends import triton as gpu
from repo_kernels.backends.eager.dense import VALUES
from repo_kernels.backends.memory_layout import gradient_buffer
from tests.support.kernels.row_cases import TOKENS, Case, Expected, make_case, make_code, oracle, relative, token_values

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
PIECES = 64  # of 16 bytes in a block, in most tests
BLOCK = {dtype: PIECES * 16 // dtype.itemsize for dtype in DTYPES}
PLAIN = make_code(codes.COST_NONE, codes.KL_NONE, kl_importance_weighted=False)


def placed(values: Tensor, stride: int | None = None, offset: int = 0) -> Tensor:
    """(n, V) values at a row stride and a base of the caller's choice; what lies between the rows is NaN."""
    count, columns = values.shape
    stride = columns if stride is None else stride
    storage = torch.full((offset + count * stride + 16,), torch.nan, dtype=values.dtype)
    view = storage.as_strided((count, columns), (stride, 1), offset)
    return view.copy_(values)


def random_logits(count: int, columns: int, dtype: torch.dtype, seed: int = 0, spread: float = 2.0) -> Tensor:
    return (torch.randn(count, columns, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def make_rows(logits: Tensor, code: codes.Code = PLAIN, entropy: int = 0, **options: Any) -> Case:
    """A loss over the rows of logits, all live; old and reference log-probabilities are near the current ones."""
    scalars = {"lam": 0.7, "beta": 0.3, "eps_high": 0.25, "entropy_coef": 0.2 * (entropy > 1)}
    return make_case(logits.shape[-1], logits=logits, code=code, entropy=entropy, **{"dead": 0.0, **scalars, **options})


def check(losses: Tensor, tokens: Tensor, grad: Tensor | None, expected: Expected, dtype: torch.dtype) -> None:
    """Assert losses, values by token and gradient within tolerance of the oracle."""
    torch.testing.assert_close(losses.double(), expected.losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.double(), expected.tokens, rtol=1e-5, atol=1e-5)
    for name in ("logp", "entropy"):
        row = TOKENS.index(name)
        finite = expected.tokens[row].isfinite()
        assert relative(tokens[row][finite], expected.tokens[row][finite]) <= 1e-6, name
    if grad is not None:
        least = 2.0**-14 if dtype == torch.float16 else 0.0
        large = expected.grad.abs() >= least
        assert relative(grad[large], expected.grad[large]) <= GRADIENT_TOLERANCE[dtype]
        assert grad.isfinite().all()


def run_and_check(case: Case) -> Tensor:
    """fused, out of place, against the oracle."""
    grad = gradient_buffer(case.logits)
    results = case.into(gpu, case.logits, grad)
    check(results.rows[0], token_values(results), grad, oracle(case), case.logits.dtype)
    return grad


def kill(case: Case, dead: list[int]) -> Case:
    """The case with rows whose id is -100 and whose values are not numbers."""
    tensors = {}
    for name in VALUES:
        tensors[name] = getattr(case.arguments, name).clone()
        tensors[name][dead] = torch.nan
    tensors["reward_advantages"][dead[0]] = torch.inf
    ids = case.ids.clone()
    ids[dead] = codes.IGNORED
    return case.replace(token_ids=ids, **tensors)
