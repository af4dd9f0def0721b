"""A temperature for each row in whole graphs, in operator checks and under transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from repo_kernels import (
    LoraHead,
    RepoLoss,
    linear_repo_loss,
    linear_selective_log_softmax,
    repo_loss,
    selective_log_softmax,
)
from repo_kernels.losses.heads.operators import linear_slopes_gradient, linear_statistics
from repo_kernels.losses.ops import fused_loss, row_gradient, row_statistics
from tests.support.kernels.cases import loss_arguments, make_batch
from tests.support.kernels.operations import Operations

V = 11
BATCH = make_batch(1, (3, 5), V, dtype=torch.float32)
ARGUMENTS = loss_arguments(BATCH, reference="k3", beta=0.2, entropy_coef=0.1)
IDS, WEIGHT = BATCH.token_ids.masked_fill(BATCH.dead, -100), torch.eye(V)
LORA = LoraHead(WEIGHT, torch.full((2, V), 0.1), torch.full((V, 2), 0.2), 0.5)
FUNCTIONS: dict[str, Any] = {
    "loss": lambda z, by: repo_loss(z, **ARGUMENTS, temperature=by).loss,
    "sequence ratio": lambda z, by: repo_loss(z, **ARGUMENTS, temperature=by, ratio_level="sequence").loss,
    "module": lambda z, by: MODULE(z, **GIVEN, temperature=by).loss,
    "linear loss": lambda z, by: linear_repo_loss(z, WEIGHT, **ARGUMENTS, temperature=by).loss,
    "LoRA": lambda z, by: linear_repo_loss(z, LORA, **ARGUMENTS, temperature=by).loss,
    "log-probs": lambda z, by: sum(selective_log_softmax(z, IDS, temperature=by, return_entropy=True)).sum(),
    "linear log-probs": lambda z, by: linear_selective_log_softmax(z, WEIGHT, IDS, temperature=by).sum(),
}
MODULE = RepoLoss()
OPTIONS = ("cost_mode", "loss_agg_mode", "kl_estimator", "entropy_coef")
GIVEN = {name: x for name, x in ARGUMENTS.items() if name not in OPTIONS}


@pytest.mark.parametrize("each", ["rows", "sequences"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_serves_all_values(name: str, each: str) -> None:
    counter, function = CompileCounter(), FUNCTIONS[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for _ in range(4):
        by = BATCH.temperatures(per_sequence=each == "sequences")
        results = []
        for run in (function, compiled):
            leaf = BATCH.logits.clone().requires_grad_()
            value = run(leaf, by)
            value.backward()
            results.append((value, leaf.grad))
        torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_whole_graph_gives_what_the_plain_call_gives(name: str) -> None:
    by, results = BATCH.temperatures(per_sequence=False), []
    torch._dynamo.reset()
    for run in (FUNCTIONS[name], torch.compile(FUNCTIONS[name], backend="aot_eager", fullgraph=True)):
        leaf = BATCH.logits.clone().requires_grad_()
        value = run(leaf, by)
        value.backward()
        results.append((value, leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_operator_checks(backend: str) -> None:
    with Operations() as operations:
        by = BATCH.temperatures(per_sequence=False)
        repo_loss(BATCH.logits.clone().requires_grad_(), **ARGUMENTS, temperature=by, backend=backend)
    logits, *rest = operations.arguments_of(torch.ops.repo_kernels.fused_loss.default)
    sample = logits.detach().nan_to_num(0.0).requires_grad_()
    torch.library.opcheck(fused_loss, (sample, *rest))
    ids, by = IDS.reshape(-1), by.reshape(-1).nan_to_num(1.0)
    sample = sample.detach()
    torch.library.opcheck(row_statistics, (sample.clone().requires_grad_(), ids, by, 0.0, 1, backend))
    state, slopes = row_statistics(sample, ids, by, 0.0, 1, backend), torch.randn(3, ids.numel())
    torch.library.opcheck(row_gradient, (sample, ids, state, slopes, by, 0.0, backend))
    head, how = (sample, WEIGHT, None, None, None, None), ([True, True, False, False, False], 4, None, backend)
    leaves = (sample.clone().requires_grad_(), WEIGHT.clone().requires_grad_(), *head[2:])
    torch.library.opcheck(linear_statistics, (*leaves, ids, by, 0.0, 1, *how))
    torch.library.opcheck(linear_slopes_gradient, (*head, ids, by, state, slopes, 0.0, *how))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_give_the_gradient_of_the_kernels(name: str) -> None:
    function = FUNCTIONS[name]
    for each in (False, True):
        by = BATCH.temperatures(each)
        leaf = BATCH.logits.clone().requires_grad_()
        function(leaf, by).backward()
        composed = torch.func.grad(function)(BATCH.logits, by)
        torch.testing.assert_close(composed, leaf.grad, rtol=1e-4, atol=1e-6)
        tangent = torch.ones_like(leaf).masked_fill(BATCH.dead[..., None], 0.0) * torch.arange(V)
        _, slope = torch.func.jvp(lambda z, by=by: function(z, by), (BATCH.logits,), (tangent,))
        torch.testing.assert_close(slope, (leaf.grad * tangent).sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ratio_level", ["token", "sequence"])
def test_under_a_transform_dead_rows_do_not_reach_the_gradient_of_a_head(ratio_level: str) -> None:
    by = BATCH.temperatures(per_sequence=False)

    def both(weight: Tensor) -> Tensor:
        arguments = ARGUMENTS | {"ratio_level": ratio_level}
        loss = linear_repo_loss(BATCH.logits, weight, **arguments, temperature=by).loss
        return loss + linear_selective_log_softmax(BATCH.logits, weight, IDS, temperature=by).sum()

    leaf = WEIGHT.clone().requires_grad_()
    both(leaf).backward()
    torch.testing.assert_close(torch.func.grad(both)(WEIGHT), leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["loss", "log-probs"])
def test_vmap_runs_over_temperatures(name: str) -> None:
    many = torch.stack([BATCH.temperatures(per_sequence=True) for _ in range(3)])
    got = torch.func.vmap(lambda by: FUNCTIONS[name](BATCH.logits, by))(many)
    expected = torch.stack([FUNCTIONS[name](BATCH.logits, by) for by in many])
    torch.testing.assert_close(got, expected)


def test_a_derivative_in_the_temperature_is_refused() -> None:
    def loss(by: Tensor) -> Tensor:
        return FUNCTIONS["loss"](BATCH.logits, by)

    with pytest.raises(ValueError, match="temperature gets no gradient"):
        torch.func.grad(loss)(torch.ones(3))
    with pytest.raises(ValueError, match="temperature gets no gradient"):
        torch.func.jvp(loss, (torch.ones(3),), (torch.ones(3),))
