"""Impossible, tiny and huge logits: cases 1 to 4 of the numerics that other implementations got wrong."""

from __future__ import annotations

import math

import pytest
import torch

from repo_kernels import linear_repo_loss, repo_loss, selective_log_softmax
from tests.support.kernels.cases import loss_arguments, make_batch
from tests.support.kernels.comparison import alive, compare, relative
from tests.support.kernels.oracle import oracle_gradient, oracle_loss

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]
INF = math.inf


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize("where", ["leading block", "every other", "all but the target"])
def test_case_1_impossible_entries_leave_every_output_finite(where: str, softcap: float | None) -> None:
    batch = alive(1)
    batch.token_ids = torch.full_like(batch.token_ids, 13)
    gone = {"leading block": slice(0, 9), "every other": slice(0, 16, 2), "all but the target": slice(0, 13)}[where]
    batch.logits[..., gone] = -INF
    batch.ref_logits[..., gone] = -INF
    if where == "all but the target":
        batch.logits[..., 14:] = batch.ref_logits[..., 14:] = -INF
    arguments = loss_arguments(batch, reference="full", beta=0.3, entropy_coef=0.2, softcap=softcap, lam=1.0)
    logits = batch.logits.clone().requires_grad_()
    out = repo_loss(logits, **arguments)
    out.loss.backward()
    for value in (out.loss, out.logps, out.entropy, out.kl, out.stats.tensor, logits.grad):
        assert value.isfinite().all()
    assert (logits.grad[..., gone] == 0).all()
    if softcap is None and where == "all but the target":
        assert (out.logps == 0).all()
        assert (out.entropy == 0).all()
        assert (logits.grad.abs() <= 2**-24).all()  # case 4: the target's probability is 1
    elif softcap is None:
        kept = torch.ones(16, dtype=torch.bool)
        kept[gone] = False
        small = torch.log_softmax(batch.logits[..., kept].double(), -1)
        assert relative(out.entropy, -(small.exp() * small).sum(-1)) <= 1e-6


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
def test_case_1_an_impossible_target_has_ratio_by_the_clamp_and_no_nan(on_policy: bool, estimator: str) -> None:
    batch = alive(2)
    batch.logits.scatter_(-1, batch.token_ids[..., None], -INF)
    arguments = loss_arguments(batch, reference=estimator, beta=0.1, entropy_coef=0.1, on_policy=on_policy)
    logits = batch.logits.clone().requires_grad_()
    out = repo_loss(logits, **arguments)
    out.loss.backward()
    assert (out.logps == -INF).all()
    assert out.stats.ratio_max == (1.0 if on_policy else torch.tensor(-20.0).exp())
    for value in (out.loss, out.entropy, out.kl, out.stats.tensor, logits.grad):
        assert value.isfinite().all()


def test_case_1_a_target_impossible_under_both_policies_has_ratio_one() -> None:
    batch = alive(3)
    batch.logits.scatter_(-1, batch.token_ids[..., None], -INF)
    batch.old_logps = torch.full_like(batch.old_logps, -INF)
    batch.ref_logps = torch.full_like(batch.ref_logps, -INF)
    out = repo_loss(batch.logits, **loss_arguments(batch, reference="k3", beta=1.0))
    assert out.stats.ratio_min == out.stats.ratio_max == 1
    assert (out.kl == 0).all()
    assert out.loss.isfinite()


def test_case_1_an_underflowing_probability_is_worth_nothing_in_the_full_kl() -> None:
    """exp(-1e30) is 0 in any precision: a vocabulary mask by a large negative number is a mask."""
    batch = alive(4)
    batch.token_ids = torch.full_like(batch.token_ids, 13)
    batch.logits[..., :8] = -1e30
    batch.ref_logits[..., :8] = -INF
    arguments = loss_arguments(batch, reference="full", beta=0.3)
    logits = batch.logits.clone().requires_grad_()
    out = repo_loss(logits, **arguments)
    out.loss.backward()
    batch.logits[..., :8] = -INF
    exact = batch.logits.double().requires_grad_()
    expected = oracle_loss(exact, **arguments)
    assert relative(out.kl, expected.kl) <= 1e-6
    assert relative(logits.grad, oracle_gradient(expected, exact)) <= 5e-6


@pytest.mark.parametrize("offset", [-110.0, -3e4])
def test_case_2_logits_whose_exponentials_all_underflow(offset: float) -> None:
    batch = alive(5)
    batch.logits = batch.logits - batch.logits.amax() + offset - 1
    assert (batch.logits < -110).all()
    exact = torch.log_softmax(batch.logits.double(), -1).gather(-1, batch.token_ids[..., None]).squeeze(-1)
    batch.old_logps, batch.ref_logps = (exact + 0.1).float(), (exact - 0.4).float()
    compare(batch, loss_arguments(batch, reference="k3", beta=0.3, entropy_coef=0.1))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_case_3_a_common_offset_costs_no_accuracy(offset: float, temperature: float, backend: str) -> None:
    batch = alive(6, vocabulary=1000, spread=0.1)
    batch.logits = batch.logits + offset
    logps, entropy = selective_log_softmax(batch.logits, batch.token_ids, temperature=temperature, return_entropy=True)
    exact = torch.log_softmax(batch.logits.double() / temperature, -1)
    assert relative(logps, exact.gather(-1, batch.token_ids[..., None]).squeeze(-1)) <= 1e-6
    assert relative(entropy, -(exact.exp() * exact).sum(-1)) <= 1e-6
    assert (logps <= 0).all()
    columns = torch.arange(0, 1000, 500 if backend == "triton" else 1)  # the interpreter is slow
    everything = columns.expand(12, -1).T.reshape(-1)
    every_row = batch.logits.view(12, 1000).repeat(len(columns), 1)
    all_logps = selective_log_softmax(every_row, everything, temperature=temperature)
    assert (all_logps <= 0).all()


@pytest.mark.parametrize("temperature", [0.5, 1.45, 1.5, 2.0, 3.0, 4.0, 10.0])
@pytest.mark.parametrize("softcap", [None, 7.0])
def test_any_temperature_leaves_log_probs_entropy_and_gradient_accurate(
    temperature: float, softcap: float | None
) -> None:
    """Padding and -inf must count for nothing, however the scale rounds."""
    batch = alive(19, (4,), 40)
    batch.logits[:, 3:9] = -INF
    batch.token_ids = batch.token_ids % 3
    logits, exact = batch.logits.clone().requires_grad_(), batch.logits.double().requires_grad_()
    options = {"temperature": temperature, "softcap": softcap, "return_entropy": True}
    got = selective_log_softmax(logits, batch.token_ids, **options)
    expected = selective_log_softmax(exact, batch.token_ids, backend="eager", **options)
    for mine, true in zip(got, expected, strict=True):
        assert relative(mine, true.detach()) <= 2e-6
        (mine.sum() if mine is got[0] else 0.3 * mine.sum()).backward(retain_graph=True)
        (true.sum() if mine is got[0] else 0.3 * true.sum()).backward(retain_graph=True)
    assert relative(logits.grad, exact.grad) <= 5e-6


@pytest.mark.parametrize("row", ["all -inf", "scaled maximum beyond 2^31"])
def test_a_row_without_digits_is_nan_and_never_a_wrong_number(row: str, backend: str) -> None:
    logits = torch.full((2, 9), -INF) if row == "all -inf" else torch.tensor([[3e10], [2e10]]).repeat(1, 9)
    logits = torch.cat((logits, torch.randn(1, 9)))
    logps = selective_log_softmax(logits, torch.tensor([1, 2, 3]))
    if backend != "eager" or row == "all -inf":  # eager subtracts before it scales, and is exact there
        assert logps[:2].isnan().all()
    assert logps[2].isfinite()


@pytest.mark.parametrize("margin", [2.0, 5.0, 8.0, 12.0, 16.0, 20.0])
def test_case_4_the_target_gradient_survives_a_probability_near_one(margin: float) -> None:
    logits = torch.zeros(1, 3, dtype=torch.bfloat16)
    logits[0, 1] = margin
    logits.requires_grad_()
    selective_log_softmax(logits, torch.tensor([1])).backward(torch.ones(1))
    exact = -math.expm1(-math.log1p(2 * math.exp(-margin)))
    error = abs(logits.grad[0, 1].item() - exact)
    assert error <= (4e-3 * exact if exact >= 1e-4 else 2**-24)
    assert logits.grad[0, 0] < 0


@pytest.mark.parametrize("margin", [2.0, 8.0, 12.0, 16.0, 20.0])
def test_the_definition_has_every_digit_of_one_minus_p(margin: float) -> None:
    """Eager's log1p and expm1: 1 - p in fp32 would have no digit left at a margin of 20."""
    logits = torch.tensor([[0.0, margin, 0.0]], requires_grad=True)
    selective_log_softmax(logits, torch.tensor([1]), backend="eager").backward(torch.ones(1))
    exact = -math.expm1(-math.log1p(2 * math.exp(-margin)))
    assert abs(logits.grad[0, 1].item() - exact) <= 1e-6 * exact


def test_the_gradient_keeps_its_accuracy_where_the_softcap_saturates() -> None:
    """1 - tanh^2 cancels at four times the cap; the whole row is there, so nothing larger hides it."""
    batch = alive(17, (16,), 50)
    batch.logits = 20 + batch.logits / 2
    logits, exact = batch.logits.clone().requires_grad_(), batch.logits.double().requires_grad_()
    selective_log_softmax(logits, batch.token_ids, softcap=5.0).sum().backward()
    torch.log_softmax(5 * torch.tanh(exact / 5), -1).gather(-1, batch.token_ids[:, None]).sum().backward()
    assert relative(logits.grad, exact.grad) <= 5e-6


def test_fp16_gradients_of_the_linear_form_survive_under_a_loss_scaler() -> None:
    """p / N underflows fp16 unless the scaler's upstream factor or grad_scale is there when it is rounded."""
    batch = make_batch(18, (64,), 200, dtype=torch.float32, dead=0.0)
    hidden, weight = batch.normal(64, 32).half(), batch.normal(200, 32, scale=0.02).half()
    arguments = {**loss_arguments(batch, per_sequence=False, on_policy=True), "divisor": 65536.0}
    half = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    (linear_repo_loss(*half, **arguments, grad_scale=2.0**16).loss * 2.0**20).backward()
    expected = oracle_loss(exact[0] @ exact[1].T, **arguments)
    for mine, leaf in zip(half, exact, strict=True):
        assert relative(mine.grad.double() / 2.0**20, oracle_gradient(expected, leaf)) <= 5e-4


@pytest.mark.parametrize("delta", [-19.9, -20.1, -40.0, -torch.inf])
def test_ratio_times_k3_pulls_back_to_the_reference_beyond_its_clamp(delta: float) -> None:
    """Differentiating the clamped value literally gives +3.6e7 at -20.1; the gradient of rho k3 is rho delta."""
    ids, probability = torch.tensor([0]), torch.exp(torch.tensor(delta, dtype=torch.float64))
    rest = torch.log((1 - probability * 0.5) / 3).expand(3)
    logits = torch.cat([(torch.log(torch.tensor(0.5, dtype=torch.float64)) + delta)[None], rest])[None]
    logits.requires_grad_()
    ref = torch.log(torch.tensor([0.5], dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.float64)
    repo_loss(logits, ids, None, zero, ref_logps=ref, beta=0.1).loss.backward()
    assert logits.grad is not None
    clamped = max(delta, -20.0)
    assert logits.grad[0, 0].item() == pytest.approx(0.1 * clamped, rel=1e-6)
