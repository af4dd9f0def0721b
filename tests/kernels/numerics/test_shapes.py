"""Numerics, continued: views and odd shapes (9), 0-d scalars (13), kinks (16), one-sided batches (17)."""

from __future__ import annotations

import math

import pytest
import torch

from repo_kernels import linear_repo_loss, linear_selective_log_softmax, repo_loss, selective_log_softmax
from tests.support.kernels.cases import AGGREGATIONS, loss_arguments, make_batch
from tests.support.kernels.comparison import alive, compare

pytestmark = [pytest.mark.usefixtures("backend"), pytest.mark.pairwise]


@pytest.mark.parametrize("view", ["[:, :-1]", "[:, 1:]", "transposed batch", "every other row", "column slice"])
def test_case_9_views_are_read_and_differentiated_in_place(view: str, backend: str) -> None:
    batch = alive(10, (3, 5), 9)
    base = batch.normal(6, 12, 20).requires_grad_()
    logits = {
        "[:, :-1]": lambda x: x[:3, :6, :9][:, :-1],
        "[:, 1:]": lambda x: x[:3, :6, :9][:, 1:],
        "transposed batch": lambda x: x[:5, :3, :9].transpose(0, 1),
        "every other row": lambda x: x[::2, :10:2, :9],
        "column slice": lambda x: x[:3, :5, 7:16],
    }[view](base)
    assert logits.shape == (3, 5, 9)
    assert not logits.is_contiguous()
    arguments = loss_arguments(batch, reference="k3", beta=0.2, entropy_coef=0.1)
    out = repo_loss(logits, **arguments)
    (got,) = torch.autograd.grad(out.loss, base)
    copy = logits.detach().clone().requires_grad_()
    expected = repo_loss(copy, **arguments)
    expected.loss.backward()
    (spread,) = torch.autograd.grad(logits, base, copy.grad)
    if backend == "triton":  # a row's sums are grouped from its first 16-byte boundary, which is elsewhere in the copy
        torch.testing.assert_close(out.loss, expected.loss, rtol=1e-6, atol=0)
        assert (got - spread).norm() <= 1e-6 * spread.norm()
    else:
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(got, spread)


def test_case_9_an_expanded_row_is_read_and_its_gradient_is_the_sum() -> None:
    batch = alive(11, (6,), 9)
    row = batch.normal(1, 9).double().requires_grad_()
    arguments = loss_arguments(batch, per_sequence=False)
    repo_loss(row.expand(6, 9), **arguments).loss.backward()
    copy = row.detach().repeat(6, 1).requires_grad_()
    repo_loss(copy, **arguments).loss.backward()
    torch.testing.assert_close(row.grad, copy.grad.sum(0, keepdim=True), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["T = 0", "B = 0", "L = 0", "no sequences", "empty sequences", "masked", "ignored"])
@pytest.mark.parametrize("reference", ["k3", "full"])
def test_case_9_nothing_live_gives_loss_zero_and_gradient_zero(reference: str, kind: str, loss_agg_mode: str) -> None:
    shapes = {
        "T = 0": {"lengths": [0]},
        "B = 0": {"leading": (0, 4)},
        "L = 0": {"leading": (3, 0)},
        "no sequences": {"lengths": []},
        "empty sequences": {"lengths": [0, 0, 0]},
    }
    batch = make_batch(12, dtype=torch.float32, dead=2.0, **shapes.get(kind, {"leading": (2, 3)}))
    if kind == "ignored":
        batch.token_ids = torch.full_like(batch.token_ids, -100)
        batch.response_mask = torch.ones_like(batch.response_mask)
    arguments = loss_arguments(
        batch, loss_agg_mode=loss_agg_mode, reference=reference, beta=0.3, entropy_coef=0.1, lam=1.0
    )
    logits = batch.logits.clone().requires_grad_()
    out = repo_loss(logits, **arguments)
    assert (out.loss == 0).all()
    assert out.loss.ndim == (0 if loss_agg_mode != "none" else len(batch.leading))
    assert (out.logps == 0).all()
    assert (out.kl == 0).all()
    assert out.stats.tensor.isfinite().all()
    out.loss.sum().backward()
    assert logits.grad.shape == logits.shape
    assert (logits.grad == 0).all()

    arguments.pop("ref_logits", None)
    hidden, weight = batch.normal(*batch.leading, 4).requires_grad_(), batch.normal(7, 4).requires_grad_()
    if reference == "full":
        arguments |= {"ref_hidden": hidden.detach(), "ref_weight": weight.detach()}
    linear = linear_repo_loss(hidden, weight, **arguments)
    linear.loss.sum().backward()
    assert (linear.loss == 0).all()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_case_9_log_probabilities_of_no_row_are_an_empty_tensor(leading: tuple[int, ...]) -> None:
    hidden = torch.zeros(*leading, 4).requires_grad_()
    weight = torch.ones(5, 4).requires_grad_()
    ids = torch.zeros(leading, dtype=torch.int64)
    dense = selective_log_softmax(hidden, ids, return_entropy=True)
    linear = linear_selective_log_softmax(hidden, weight, ids, return_entropy=True)
    assert all(x.shape == leading for x in (*dense, *linear))
    sum(x.sum() for x in (*dense, *linear)).backward()
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_case_9_a_vocabulary_of_one_has_no_surprise_and_no_gradient(dtype: torch.dtype) -> None:
    logits = torch.tensor([[7.0], [-3.0]], dtype=dtype, requires_grad=True)
    zero = torch.zeros(2)
    out = repo_loss(
        logits, torch.tensor([0, 0]), zero, torch.ones(2), ref_logps=zero, beta=1.0, entropy_coef=1.0, softcap=9.0
    )
    out.loss.backward()
    assert (out.logps == 0).all()
    assert (out.entropy == 0).all()
    assert out.loss == -1
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("vocabulary", [2, 3, 7, 9, 15, 17, 1023, 50_257])
def test_case_9_one_row_of_any_vocabulary_agrees_with_the_oracle(vocabulary: int) -> None:
    batch = alive(13, (1,), vocabulary, scale=1.0)
    compare(batch, loss_arguments(batch, reference="k3", beta=0.3, entropy_coef=0.1))


SCALARS = {
    "lam": 1.7,
    "beta": 0.3,
    "eps_low": 0.1,
    "eps_high": 0.28,
    "entropy_coef": 0.05,
    "temperature": 0.7,
    "dual_clip": 1.4,
    "grad_scale": 3.3,
    "cost_limit": 0.4,
}


@pytest.mark.parametrize("scalar_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [*SCALARS, "all"])
# the interpreter is slow, and every backend reads the same vector
@pytest.mark.leave_out(lambda backend, name: backend == "triton" and name != "all")
def test_case_13_a_scalar_as_a_0_d_tensor_gives_the_bits_of_the_float(
    name: str, scalar_dtype: torch.dtype, backend: str
) -> None:
    batch = alive(14, (3, 4) if backend == "triton" else (12, 10), spread=0.6)
    arguments = {**loss_arguments(batch, reference="k3"), **SCALARS}
    names = SCALARS if name == "all" else (name,)
    tensors = {n: torch.tensor(SCALARS[n], dtype=scalar_dtype) for n in names}
    outcomes = []
    for mine in (arguments, {**arguments, **tensors}, {**arguments, **{n: SCALARS[n] * 1.3 for n in names}}):
        logits = batch.logits.clone().requires_grad_()
        out = repo_loss(logits, **mine)
        out.loss.backward()
        outcomes.append((out, logits.grad))
    (by_float, float_grad), (by_tensor, tensor_grad), (other, other_grad) = outcomes
    assert torch.equal(by_float.loss, by_tensor.loss)
    assert torch.equal(by_float.stats.tensor, by_tensor.stats.tensor)
    assert torch.equal(float_grad, tensor_grad)
    assert not torch.equal(float_grad, other_grad) or not torch.equal(by_float.loss, other.loss)


def test_case_13_a_zero_0_d_multiplier_is_the_loss_without_penalty() -> None:
    batch = alive(15)
    arguments = loss_arguments(batch, cost_form="given")
    off = repo_loss(batch.logits, **arguments)
    assert torch.equal(off.loss, repo_loss(batch.logits, **arguments, lam=torch.tensor(0.0)).loss)


@pytest.mark.parametrize("mode", ["rectified", "split"])
def test_case_16_a_cost_at_the_limit_is_safe(mode: str) -> None:
    """C = d exactly: no hinge, no gate; the next float above is unsafe."""
    limit = 0.375
    above = math.nextafter(limit, 1) if mode == "split" else limit + 2**-20
    costs = torch.tensor([limit, above, limit - 1], dtype=torch.float64)
    out = repo_loss(
        torch.zeros(3, 1, 4, dtype=torch.float64),
        torch.zeros(3, 1, dtype=torch.int64),
        None,
        torch.ones(3),
        torch.full((3,), 10.0) if mode == "split" else None,
        cost_mode=mode,
        costs=costs,
        cost_limit=limit,
        lam=1.0,
        loss_agg_mode="none",
    )
    expected = [-1.0, 9.0, -1.0] if mode == "split" else [-1.0, -1.0 + 2**-20, -1.0]
    assert out.loss.flatten().tolist() == expected
    assert out.stats.sequences_unsafe == 1
    assert out.stats.tokens_unsafe == 1


@pytest.mark.parametrize("edge", ["low", "high"])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_case_16_at_the_edge_of_the_clip_the_unclipped_branch_carries_the_gradient(edge: str, advantage: float) -> None:
    """rho = exp(0) = 1 is exactly at an edge of width 0; one ulp of log pi further it is clipped or not, by sign."""
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    logp = selective_log_softmax(logits.detach(), torch.tensor([2]))
    widths = {"eps_low": 0.0, "eps_high": 0.5} if edge == "low" else {"eps_low": 0.5, "eps_high": 0.0}
    reward = torch.tensor([advantage])
    at = repo_loss(logits, torch.tensor([2]), logp, reward, **widths)
    (gradient,) = torch.autograd.grad(at.loss, logits)
    assert gradient[0, 2].item() == -advantage * 0.75
    assert at.stats.clip_fraction == 0

    outward = 1e-9 if edge == "high" else -1e-9
    beyond = repo_loss(logits, torch.tensor([2]), logp - outward, reward, **widths)
    (gradient,) = torch.autograd.grad(beyond.loss, logits)
    clipped = (edge == "high") == (advantage > 0)
    assert (gradient.abs().max().item() == 0) == clipped
    assert beyond.stats.clip_fraction == float(clipped)


def test_case_16_at_the_edge_of_the_dual_clip_the_ratio_carries_the_gradient() -> None:
    """rho = 2 = c exactly on logits (ln 3, 0, 0, 0) against an old probability of 1/4."""
    logits = torch.tensor([[math.log(3), 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    ids, reward = torch.tensor([0]), torch.tensor([-1.0])
    logp = selective_log_softmax(logits.detach(), ids)
    old = logp - math.log(2)
    ratio = (logp - old).exp().item()
    for clip, carries in ((ratio, True), (ratio * (1 - 1e-12), False)):
        out = repo_loss(logits, ids, old, reward, dual_clip=clip)
        (gradient,) = torch.autograd.grad(out.loss, logits)
        assert out.loss.item() == pytest.approx(2.0, rel=1e-11)
        assert (gradient.abs().max() > 0) == carries


@pytest.mark.parametrize("distance", [19.5, 20.5, -19.5, -20.5])
def test_case_16_beyond_the_clamp_of_twenty_the_value_is_flat(distance: float) -> None:
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2])
    logp = selective_log_softmax(logits.detach(), ids)
    reward = torch.tensor([-1.0 if distance > 0 else 1.0])
    out = repo_loss(
        logits, ids, logp - distance, reward, ref_logps=(logp - distance).float(), kl_estimator="k2", beta=1.0
    )
    (gradient,) = torch.autograd.grad(out.loss, logits)
    bounded = max(-20.0, min(20.0, distance))
    assert out.loss.item() == pytest.approx(-math.exp(bounded) * reward.item() + bounded**2 / 2, rel=1e-6)
    assert (gradient.abs().max() > 0) == (abs(distance) < 20)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_case_16_a_ratio_held_by_the_clamp_still_weighs_the_slope_of_the_kl(estimator: str) -> None:
    """d(rho KL) = rho dKL where rho is constant: dKL = 1 for k1, 1 - exp(-delta) for k3; A = 0 adds nothing."""
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2])
    logp = selective_log_softmax(logits.detach(), ids)
    reference = {"ref_logps": logp - 0.5, "kl_estimator": estimator, "beta": 1.0}
    out = repo_loss(logits, ids, logp + 21, torch.zeros(1), **reference)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    slope = 1.0 if estimator == "k1" else 1 - math.exp(-0.5)
    assert gradient[0, 2].item() == pytest.approx(0.75 * math.exp(-20) * slope, rel=1e-12)


@pytest.mark.parametrize("mode", ["rectified", "split", "lagrangian"])
@pytest.mark.parametrize("side", [-1.0, 1.0], ids=["all safe", "all unsafe"])
@pytest.mark.parametrize("loss_agg_mode", AGGREGATIONS)
def test_case_17_a_batch_of_one_side_only_is_finite_and_right(mode: str, side: float, loss_agg_mode: str) -> None:
    batch = alive(16)
    arguments = loss_arguments(batch, mode=mode, cost_form="given", lam=2.0, loss_agg_mode=loss_agg_mode)
    arguments["costs"] = arguments["costs"].abs() * side + side
    out = compare(batch, arguments)
    assert out.stats.unsafe_fraction == (1.0 if side > 0 else 0.0)
