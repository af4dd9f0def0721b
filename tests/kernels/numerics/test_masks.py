"""Upstream gradients, masks and huge batches: cases 5 to 8 of the numerics that other implementations got wrong."""

from __future__ import annotations

import math

import pytest
import torch

from repo_kernels import linear_repo_loss, repo_loss, selective_log_softmax
from tests.support.kernels.cases import AGGREGATIONS, loss_arguments, make_batch
from tests.support.kernels.comparison import alive, relative
from tests.support.kernels.oracle import oracle_gradient, oracle_loss

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]
INF = math.inf


@pytest.mark.parametrize("kind", ["non-uniform", "expanded", "strided", "transposed", "reversed by flip"])
def test_case_5_the_upstream_gradient_may_have_any_values_and_strides(kind: str) -> None:
    batch = alive(7, (4, 6))
    base = batch.normal(4, 6)
    upstream = {
        "non-uniform": base,
        "expanded": base[:1, :1].expand(4, 6),
        "strided": batch.normal(8, 12)[::2, ::2],
        "transposed": batch.normal(6, 4).T,
        "reversed by flip": base.flip(0),
    }[kind]
    arguments = loss_arguments(batch, loss_agg_mode="none", reference="k3", beta=0.2, entropy_coef=0.1)
    exact = batch.logits.double().requires_grad_()
    wanted = oracle_gradient(oracle_loss(exact, **arguments), exact, upstream)
    for inplace in (False, True):
        logits = batch.logits.clone().requires_grad_()
        repo_loss(logits, **arguments, inplace=inplace).loss.backward(upstream)
        assert relative(logits.grad, wanted) <= 5e-6

    logits = batch.logits.clone().requires_grad_()
    logps, entropy = selective_log_softmax(logits, batch.token_ids, return_entropy=True)
    torch.autograd.backward((logps, entropy), (upstream, 2 * upstream))
    exact = torch.log_softmax(batch.logits.double().requires_grad_(), -1)
    target = torch.nn.functional.one_hot(batch.token_ids, 16).double()
    p, h = exact.exp(), -(exact.exp() * exact).sum(-1, keepdim=True)
    up = upstream.double()[..., None]
    assert relative(logits.grad, (up * (target - p) - 2 * up * p * (exact + h)).detach()) <= 5e-6


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
@pytest.mark.parametrize(
    "name",
    [
        "logits",
        "ref_logits",
        "old_logps",
        "ref_logps",
        "reward_advantages",
        "cost_advantages",
        "costs",
        "importance_weights",
    ],
)
def test_case_6_poison_in_a_masked_position_reaches_nothing(name: str, poison: float) -> None:
    batch = alive(8, (2, 6))
    batch.response_mask = torch.rand(2, 6, generator=batch.generator) > 0.4
    batch.token_ids[1, 2] = -100
    reference = "full" if name == "ref_logits" else "k3"
    arguments = loss_arguments(
        batch, reference=reference, beta=0.2, lam=1.0, cost_form="given", per_sequence=False, importance_weights=True
    )
    tensors = {"logits": batch.logits, **arguments}
    results = []
    for value in (0.0, poison):
        gone = batch.dead if tensors[name].ndim == 2 else batch.dead[..., None]
        mine = {**tensors, name: tensors[name].masked_fill(gone, value)}
        logits = mine.pop("logits").requires_grad_()
        out = repo_loss(logits, **mine, entropy_coef=0.1)
        out.loss.backward()
        results.append((out.loss, out.logps, out.entropy, out.kl, out.stats.tensor, logits.grad))
    for clean, poisoned in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, poisoned)


def test_case_6_masked_infinite_reference_does_not_reach_the_gradient_of_the_weight() -> None:
    batch = make_batch(9, (2, 6), dtype=torch.float32, dead=0.8)
    hidden = batch.normal(2, 6, 4).masked_fill(batch.dead[..., None], INF).requires_grad_()
    weight = batch.normal(7, 4).requires_grad_()
    linear_repo_loss(hidden, weight, **loss_arguments(batch, reference="k3", beta=1.0)).loss.backward()
    assert weight.grad.isfinite().all()
    assert weight.grad.abs().max() > 0
    assert (hidden.grad[batch.dead] == 0).all()


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_case_7_every_aggregation_skips_masked_tokens_and_dead_sequences(loss_agg_mode: str) -> None:
    """Losses -1, -2, -3 in a sequence with three live tokens of four, -5 in one with one, nothing in a dead one."""
    reward = torch.tensor([[1.0, 2.0, 3.0, 90.0], [90.0, 5.0, 90.0, 90.0], [90.0, 90.0, 90.0, 90.0]])
    mask = reward < 90
    keywords = {"max_length": 10} if loss_agg_mode == "seq-mean-token-sum-norm" else {}
    out = repo_loss(
        torch.zeros(3, 4, 5),
        torch.zeros(3, 4, dtype=torch.int64),
        None,
        reward,
        response_mask=mask,
        loss_agg_mode=loss_agg_mode,
        **keywords,
    )
    expected = {
        "token-mean": -11 / 4,
        "token-sum": -11,
        "seq-mean-token-mean": -(2 + 5) / 2,
        "seq-mean-token-sum": -(6 + 5) / 2,
        "seq-mean-token-sum-norm": -(6 + 5) / 10 / 2,
        "none": -11,
    }[loss_agg_mode]
    assert out.loss.sum().item() == pytest.approx(expected, rel=1e-6)
    assert out.stats.sequences == 2


def test_case_8_rows_beyond_two_to_the_31_elements_are_read_where_they_are() -> None:
    """Rows overlap (row t starts at element t * 64), so 2^31 addresses take little memory; few rows are live."""
    rows, vocabulary = 4_200, 524_288
    base = torch.randn(rows * 64 + vocabulary)
    logits = base.as_strided((rows, vocabulary), (64, 1))
    assert rows * vocabulary > 2**31
    ids = torch.full((rows,), -100)
    live = [0, 1_234, 4_099, 4_199]
    ids[live] = torch.tensor([1, vocabulary - 1, 77, 300_000])
    out = repo_loss(logits, ids, None, torch.ones(rows), loss_agg_mode="token-sum")
    alone = selective_log_softmax(logits[live].contiguous(), ids[live])
    assert torch.equal(out.logps[live], alone)
    assert out.stats.tokens == 4


def test_more_rows_than_sixteen_bits_count_are_each_worked_on(backend: str) -> None:
    """Peers put the row in a grid dimension that ends at 65 535."""
    rows = 65_600 if backend != "triton" else 66  # the interpreter runs a row per millisecond; its grid is 1-D
    logits = torch.randn(1, 9).expand(rows, 9)
    ids = torch.arange(rows) % 9
    logps = selective_log_softmax(logits, ids)
    assert torch.equal(logps[9:], logps[:-9])
    assert (logps < 0).all()
