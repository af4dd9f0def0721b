"""Soft barriers: in place of {C - d}^+ of each response, and interior point, where lambda is a barrier on the mean."""

import math

import numpy as np
import pytest
import torch

from benchmarks.reproduce.table import (
    COST,
    HINGE,
    LIMIT,
    REFERENCE,
    REWARD,
    TABLE,
    distance,
    exact_gradient,
    mean_of,
    natural_step,
    optimum,
)
from repo.config.schema import AlgorithmConfig, CriticConfig, PenaltyConfig
from repo.scoring.safety import rectified_cost
from repo.training.advantages import method_advantages
from repo.training.loss import loss_options
from repo.training.multipliers import Multipliers, interior_point_lambda
from repo_kernels.advantages import barrier_cost


def softplus_barrier(costs: torch.Tensor, limit: float, tau: float, margin: float) -> np.ndarray:
    """The formula as it is written, by numpy's log(exp(0) + exp(z)), in fp64."""
    z = costs.double().numpy() - float(np.float32(limit)) + margin
    return tau * np.logaddexp(0.0, z / tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tau", "margin"), [(0.25, 0.0), (1.0, 0.5), (1e-3, 0.0), (30.0, 2.0)])
def test_the_barrier_is_its_formula(tau, margin, dtype):
    costs = torch.linspace(-50, 50, 401, dtype=dtype)
    found = barrier_cost(costs, 0.3, tau, margin)
    assert found.dtype == dtype
    expected = torch.from_numpy(softplus_barrier(costs, 0.3, tau, margin)).to(dtype)
    assert torch.allclose(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-300)
    assert (found >= 0).all()


def test_the_barrier_exceeds_the_hinge_by_at_most_tau_log_2():
    costs = torch.linspace(-3, 3, 601, dtype=torch.float64)
    excess = barrier_cost(costs, 0.0, 0.5, 0.2) - (costs + 0.2).clamp_min(0)
    assert (excess > 0).all()
    assert excess.max() == pytest.approx(0.5 * math.log(2))
    assert costs[excess.argmax()] == pytest.approx(-0.2)


@pytest.mark.parametrize("tau", [1e-9, 1e-40, 5e-324])
def test_a_width_towards_0_is_the_hinge_bit_for_bit_however_small(tau):
    costs = torch.tensor([-50.0, -0.3 - 1e-6, -0.3 + 1e-6, 0.0, 1e-6, 1.0, 50.0, math.inf])
    assert torch.equal(barrier_cost(costs, -0.3, tau), rectified_cost(costs, -0.3))
    assert barrier_cost(torch.tensor([-0.3]), -0.3, tau).item() == pytest.approx(tau * math.log(2), rel=1e-6, abs=1e-40)
    assert barrier_cost(torch.tensor([math.nan]), 0.0, tau).isnan().all()


@pytest.mark.parametrize(("tau", "margin"), [(0.0, 0.0), (-1.0, 0.0), (math.nan, 0.0), (math.inf, 0.0)])
def test_a_width_that_is_none_is_refused(tau, margin):
    with pytest.raises(ValueError, match=f"tau must be finite and > 0; got {tau}"):
        barrier_cost(torch.zeros(2), 0.0, tau, margin)


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_a_margin_that_is_none_is_refused(margin):
    with pytest.raises(ValueError, match=f"margin must be finite and >= 0; got {margin}"):
        barrier_cost(torch.zeros(2), 0.0, 1.0, margin)


@pytest.mark.parametrize("advantages", ["group", "gae"])
def test_with_a_width_towards_0_the_signals_are_those_of_repo(advantages):
    draw = torch.Generator().manual_seed(0)
    rewards, costs = torch.randn(2, 8, generator=draw)
    mask = torch.arange(5) < torch.tensor([1, 5, 2, 3, 4, 5, 1, 2])[:, None]
    values = {s: torch.randn(8, 5, generator=draw) for s in ("reward", "cost")} if advantages == "gae" else None
    arguments = CriticConfig(), rewards, costs, torch.arange(8) // 4, mask, 2.0, None, 0.0, values
    hinge = method_advantages(AlgorithmConfig(advantages=advantages, cost_limit=0.2), *arguments)
    soft = AlgorithmConfig(advantages=advantages, cost_limit=0.2, cost_mode="barrier", barrier_tau=1e-12)
    barrier = method_advantages(soft, *arguments)
    assert torch.equal(barrier.cost, hinge.cost)
    assert torch.equal(barrier.combined, hinge.combined)
    assert all(torch.equal(barrier.returns[s], hinge.returns[s]) for s in hinge.returns)


@pytest.mark.parametrize(("lam", "tau", "margin"), [(1.0, 0.25, 0.0), (5.0, 0.1, 0.0), (1.0, 1.0, 0.5)])
def test_the_barrier_reaches_its_closed_form(lam, tau, margin):
    """Trained as the loop does: the advantages of the method, with critics that are 0, and the options of the loss."""
    algorithm = AlgorithmConfig(
        cost_mode="barrier", cost_limit=LIMIT, barrier_tau=tau, barrier_margin=margin, advantages="gae"
    )
    mode = loss_options(algorithm, 1.0, None).cost_mode
    one = torch.ones(REWARD.numel(), 1, dtype=torch.bool)
    nothing = {"reward": torch.zeros(one.shape), "cost": torch.zeros(one.shape)}
    signals = REWARD.flatten(), COST.flatten(), torch.arange(len(one)), one
    advantages = method_advantages(algorithm, CriticConfig(), *signals, lam, values=nothing)
    reward, cost = (x.double().reshape(REWARD.shape) for x in (advantages.reward, advantages.cost))
    table = REFERENCE.log()
    for _ in range(150):
        table = natural_step(table, exact_gradient(table, mode, lam, reward, cost, kl_estimator="full"))
    policy = table.softmax(-1)
    barrier = torch.from_numpy(softplus_barrier(COST, LIMIT, tau, margin))
    assert distance(policy, optimum(REWARD - lam * barrier)) <= 0.01
    assert distance(policy, optimum(REWARD - lam * HINGE)) > 0.02


def test_lambda_of_a_barrier_moves_by_the_rectified_cost():
    """The barrier is positive for every response, so that lambda would rise to its cap where all are safe."""
    multipliers = Multipliers(AlgorithmConfig(cost_mode="barrier", barrier_tau=5.0), PenaltyConfig(lr=0.5))
    multipliers.update([-1.0, -2.0], 0.0)
    assert multipliers.lam == 1.0
    multipliers.update([-1.0, 2.0], 1.0)
    assert multipliers.lam == 1.5


def test_interior_point_by_hand():
    assert interior_point_lambda(-2.0, 0.0, 1.0, 10.0) == 0.5
    assert interior_point_lambda(-2.0, 1.0, 0.3, 10.0) == pytest.approx(0.1)
    assert interior_point_lambda(0.999, 1.0, 0.3, 10.0, least_slack=0.1) == pytest.approx(3.0)
    assert interior_point_lambda(1.0, 1.0, 1e-3, 10.0) == pytest.approx(1.0)  # at the limit the slack is LEAST_SLACK
    assert interior_point_lambda(1.0, 1.0, 1.0, 10.0) == 10.0
    assert interior_point_lambda(1.0 + 1e-9, 1.0, 1e-30, 10.0) == 10.0  # beyond the limit, whatever the weight
    assert interior_point_lambda(-1.0, 0.0, 0.0, 10.0) == 0.0


def test_the_barriers_weight_shrinks_by_a_factor_each_step():
    multipliers = Multipliers(AlgorithmConfig(method="interior_point"), PenaltyConfig(initial=2.0, lr=0.25, max=9.0))
    assert multipliers.lam == 2.0
    for number, costs in enumerate(([-1.0, -3.0], [-0.5], [4.0, -2.0], [-8.0, 0.0]), 1):
        multipliers.update(costs, 1.0)
        mean = sum(costs) / len(costs)
        assert multipliers.lam == (9.0 if mean > 0 else pytest.approx(2.0 / 1.25**number / -mean, rel=1e-12))
    other = Multipliers(AlgorithmConfig(method="interior_point"), PenaltyConfig(initial=2.0, lr=0.25, max=9.0))
    other.load_state_dict(multipliers.state_dict())
    for each in (multipliers, other):
        each.update([-1.5], 0.0)
    assert multipliers.lam == other.lam


def train_interior_point(initial: float, lr: float, steps: int) -> tuple[torch.Tensor, list[float], list[float], float]:
    """Natural gradient ascent on the table; returns the policy, each lambda, each mean cost and the last weight."""
    algorithm = AlgorithmConfig(method="interior_point", cost_limit=LIMIT)
    multipliers = Multipliers(algorithm, PenaltyConfig(initial=initial, lr=lr, max=1.0))
    mode = loss_options(algorithm, 1.0, None).cost_mode
    table, lams, costs = REFERENCE.log(), [], []
    for _ in range(steps):
        table = natural_step(table, exact_gradient(table, mode, multipliers.lam, REWARD, COST, kl_estimator="full"))
        lams.append(multipliers.lam)
        costs.append(mean_of(table.softmax(-1), COST))
        multipliers.update([costs[-1]], 0.0)
    return table.softmax(-1), lams, costs, multipliers.weight


def test_at_rest_lambda_times_the_slack_is_the_weight():
    """The condition of the barrier's optimum; the policy is that of the expected constraint with this lambda."""
    policy, lams, costs, _ = train_interior_point(0.02, 0.0, 150)
    assert lams[-1] * (LIMIT - costs[-1]) == pytest.approx(0.02, rel=1e-4)
    assert distance(policy, optimum(REWARD - lams[-1] * COST)) <= 1e-3
    assert costs[-1] == pytest.approx(-0.264, abs=0.01)  # more careful than the constraint asks for


def test_as_the_weight_shrinks_the_policy_approaches_the_constraint_from_within():
    policy, _, costs, weight = train_interior_point(0.01, 0.02, 150)
    assert max(costs) <= LIMIT
    assert weight < 6e-4
    expected = TABLE["oracle"]["expected_constraint"]["lam"]
    assert distance(policy, optimum(REWARD - expected * COST)) <= 0.01
