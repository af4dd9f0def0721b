"""Cases for the C++ backend, checked against float64."""

from __future__ import annotations

import torch

from repo_kernels.backends import cpu
from tests.support.kernels.row_cases import TOKENS, Case, oracle, relative

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def check(case: Case, tolerance: float = 1e-6) -> None:
    """The fused loss against float64, and in place against out of place."""
    expected, dtype = oracle(case), case.logits.dtype
    losses, tokens, grad = case.run(cpu)
    assert relative(losses, expected.losses) <= 4 * tolerance  # terms of both signs
    for name, got, exact in zip(TOKENS, tokens, expected.tokens, strict=True):
        # the ratio and what is formed from it carry the error of the difference of two log-probabilities
        slack = 1 if name in ("logp", "entropy") else 8
        if name == "kl":  # rounding a log-probability to fp32 alone moves the difference by 6e-8 of it
            logps = expected.tokens[0]
            slack = max(1.0, float(logps[logps.isfinite()].abs().max()) / 5) if logps.isfinite().any() else 1.0
        assert relative(got, exact) <= slack * tolerance or (got - exact).abs().max() <= 1e-6, name
    # with one entry the gradient is 0
    assert relative(grad, expected.grad) <= GRADIENT_TOLERANCE[dtype] or grad.shape[1] == 1
    assert grad.shape[1] > 1 or grad.abs().max() <= 1e-12
    assert not grad[~case.live].any()
    again = case.run(cpu, inplace=True)
    for mine, inplace in zip((losses, tokens, grad), again, strict=True):
        assert torch.equal(mine, inplace)


OPTIONS = {"lam": 0.7, "beta": 0.3, "dual_clip": 1.5, "temperature": 0.9}
