"""The numerics that peers got wrong, numbered as in the contract's list. Case 15, gradcheck, is test_gradients.

Cases 11 to 13 are in test_compile and test_backends; case 10 and the reproducibility of case 14 in test_buffers.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from repo_kernels import linear_repo_loss, repo_loss, selective_log_softmax
from tests.support.kernels.cases import AGGREGATIONS, Batch, loss_arguments, make_batch
from tests.support.kernels.oracle import oracle_gradient, oracle_loss

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]

INF = math.inf


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error; infinite when anything is not finite."""
    if not got.isfinite().all():
        return INF
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
