"""Batches without dead rows, and their loss and gradient against the float64 oracle."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from repo_kernels import repo_loss
from tests.support.kernels.cases import Batch, make_batch
from tests.support.kernels.oracle import oracle_gradient, oracle_loss


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error; infinite when anything is not finite."""
    if not got.isfinite().all():
        return math.inf
    return ((got.double() - expected).norm() / expected.norm()).item()


def alive(seed: int, leading: tuple[int, ...] = (3, 4), vocabulary: int = 16, **keywords: Any) -> Batch:
    """A batch of live rows only, fp32."""
    return make_batch(seed, leading, vocabulary, dtype=torch.float32, dead=0.0, **keywords)


def compare(batch: Batch, arguments: dict[str, Any], logits_tolerance: float = 1e-6, gradient: float = 5e-6) -> Any:
    """Finite outputs and agreement with the oracle on the same logits; returns the output."""
    logits = batch.logits.clone().requires_grad_()
    out = repo_loss(logits, **arguments, return_entropy=True)
    out.loss.sum().backward()
    exact = batch.logits.double().requires_grad_()
    expected = oracle_loss(exact, **arguments)
    assert out.stats.tensor.isfinite().all()
    assert relative(out.logps, expected.logps) <= logits_tolerance
    assert relative(out.entropy, expected.entropy) <= logits_tolerance
    assert relative(logits.grad, oracle_gradient(expected, exact)) <= gradient
    if expected.kl is not None:
        assert relative(out.kl, expected.kl) <= gradient
    return out
