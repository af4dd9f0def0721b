"""The loss of pairs: its value, its derivative, and the policy that minimises it."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.reproduce.table import ANSWERS, BETA, COST, LIMIT, REFERENCE, REWARD, TABLE, distance, optimum
from repo_kernels.pairs import pair_loss, penalised_rewards, soft_labels
from repo_kernels.penalty import projected_lambda

RATIOS = [(0.3, -1.2), (-4.0, 2.5), (0.0, 0.0), (700.0, -700.0), (-700.0, 700.0), (1e-3, -2e-3)]
LABELS = [0.9, 0.3, 0.5, 0.25, 1.0, 0.0]


def written_out(first: float, second: float, label: float, beta: float) -> float:
    """The formula in Python's floats, log sigmoid(z) as -log(1 + exp(-z)) or its limit."""

    def log_sigmoid(z: float) -> float:
        return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))

    scaled = beta * (first - second)
    return -label * log_sigmoid(scaled) - (1 - label) * log_sigmoid(-scaled)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.02, 1.0])
def test_the_loss_is_the_formula_also_where_sigmoid_is_0_or_1(dtype, beta):
    out = pair_loss(torch.tensor(RATIOS, dtype=dtype), torch.tensor(LABELS, dtype=torch.float64), beta)
    expected = [written_out(*pair, label, beta) for pair, label in zip(RATIOS, LABELS, strict=True)]
    assert out.losses.dtype == dtype
    assert out.losses.tolist() == pytest.approx(expected, rel=1e-12 if dtype == torch.float64 else 1e-6)
    assert out.losses.isfinite().all()


def test_a_pair_is_right_where_the_policy_moved_towards_the_better_response():
    out = pair_loss(
        torch.tensor([(2.0, 1.0), (2.0, 1.0), (2.0, 1.0), (3.0, 3.0)]), torch.tensor([0.7, 0.2, 0.5, 1.0]), 0.5
    )
    assert out.correct.tolist() == [1.0, 0.0, 0.5, 0.5]
    assert out.margins.tolist() == [0.5, -0.5, 0.0, 0.0]


def test_the_gradient_is_that_of_the_loss_and_sigmoid_minus_label():
    ratios = torch.tensor(RATIOS[:3] + RATIOS[5:], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(LABELS[:3] + LABELS[5:], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: pair_loss(x, labels, 0.7).losses, (ratios,))
    (gradient,) = torch.autograd.grad(pair_loss(ratios, labels, 0.7).losses.sum(), ratios)
    by_hand = 0.7 * (torch.sigmoid(0.7 * (ratios[:, 0] - ratios[:, 1])) - labels)
    torch.testing.assert_close(gradient, torch.stack((by_hand, -by_hand), 1).detach())


def test_the_gradient_of_far_ratios_is_finite_in_fp32():
    ratios = torch.tensor(RATIOS, requires_grad=True)
    pair_loss(ratios, torch.tensor(LABELS), 10.0).losses.sum().backward()
    assert ratios.grad.isfinite().all()
    assert ratios.grad[3].tolist() == [7.5, -7.5]  # beta (1 - p)


def test_utilities_are_the_penalised_rewards_of_both_forms():
    rewards, costs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-2.0, 0.5, 4.0])
    assert penalised_rewards(rewards, costs, 2.0, 0.5).tolist() == [1.0, 2.0, -4.0]
    assert penalised_rewards(rewards, costs, 2.0, 0.5, "lagrangian").tolist() == [6.0, 2.0, -4.0]
    labels = soft_labels(torch.stack((rewards, costs), 1))
    assert labels.tolist() == pytest.approx([1 / (1 + math.exp(y - x)) for x, y in zip(rewards, costs, strict=True)])


def minimiser(utility: torch.Tensor) -> torch.Tensor:
    """The policy (60, 12) that minimises the loss over all pairs of a prompt, weighted by pi_ref of both."""
    prompts = len(utility)
    first, second = torch.cartesian_prod(torch.arange(ANSWERS), torch.arange(ANSWERS)).T
    labels = soft_labels(torch.stack((utility[:, first], utility[:, second]), -1).reshape(-1, 2))
    weights = (REFERENCE[:, first] * REFERENCE[:, second]).reshape(-1)
    table = REFERENCE.log().clone().requires_grad_()
    optimiser = torch.optim.LBFGS([table], max_iter=1000, line_search_fn="strong_wolfe", tolerance_change=1e-15)

    def closure():
        optimiser.zero_grad()
        ratios = table.log_softmax(-1) - REFERENCE.log()
        both = torch.stack((ratios[:, first], ratios[:, second]), -1).reshape(-1, 2)
        loss = (weights * pair_loss(both, labels, BETA).losses).sum() / prompts
        loss.backward()
        return loss

    optimiser.step(closure)
    return table.detach().softmax(-1)


@pytest.mark.parametrize(
    ("cost_mode", "lam"),
    [("lagrangian", TABLE["oracle"]["expected_constraint"]["lam"]), ("rectified", 1.0), ("rectified", 5.0)],
)
def test_the_minimiser_over_all_pairs_of_the_table_is_the_closed_form(cost_mode, lam):
    policy = minimiser(penalised_rewards(REWARD, COST, lam, LIMIT, cost_mode))
    excess = COST - LIMIT if cost_mode == "lagrangian" else (COST - LIMIT).clamp_min(0)
    assert distance(policy, optimum(REWARD - lam * excess)) <= 0.01
    assert distance(policy, REFERENCE) > 0.1


def test_lambda_of_constrained_dpo_falls_to_0_and_rises_to_its_maximum():
    assert projected_lambda(1.0, 0.7, 0.5, 2.0, 10.0) == pytest.approx(1.4)
    assert projected_lambda(1.0, 0.3, 0.5, 2.0, 10.0) == pytest.approx(0.6)
    assert projected_lambda(1.0, -9.0, 0.5, 2.0, 10.0) == 0.0
    assert projected_lambda(1.0, 99.0, 0.5, 2.0, 10.0) == 10.0
    assert projected_lambda(1.0, 99.0, 0.5, 2.0, math.inf) == pytest.approx(198.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pair_loss(torch.zeros(3), torch.zeros(3), 0.1), r"log_ratios must have shape \(N, 2\).*got \(3,\)"),
        (lambda: pair_loss(torch.zeros(3, 2), torch.zeros(2), 0.1), r"labels must have shape \(3,\).*got \(2,\)"),
        (lambda: pair_loss(torch.zeros(3, 2), torch.zeros(3), 0.0), "beta must be > 0.*got 0.0"),
        (lambda: soft_labels(torch.zeros(2, 3)), r"utilities must have shape \(N, 2\).*got \(2, 3\)"),
        (lambda: penalised_rewards(torch.zeros(2), torch.zeros(3), 1.0), r"shape of rewards, \(2,\); got \(3,\)"),
        (
            lambda: penalised_rewards(torch.zeros(2), torch.zeros(2), 1.0, cost_mode="split"),
            "cost_mode must be one of 'rectified', 'lagrangian'; got 'split'",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
