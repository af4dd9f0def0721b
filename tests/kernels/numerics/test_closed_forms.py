"""A softmax table trained with repo_loss reaches the optimum that is known in closed form.

Trained as `python -m benchmarks.reproduce.table` trains it.
"""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.reproduce.table import (
    ANSWERS,
    BETA,
    COST,
    HINGE,
    LIMIT,
    PROMPTS,
    REFERENCE,
    REWARD,
    TABLE,
    Row,
    distance,
    exact_gradient,
    mean_of,
    optimum,
    repo_lambdas,
    safe_rate,
    train,
    train_lagrangian,
    train_split,
    train_with,
    unsafe_of_prompts,
)
from repo.training.advantages import token_signal
from repo.training.multipliers import repo_lambda


def test_the_table_states_the_optima_that_the_formulas_give() -> None:
    entries = {"expected_constraint": REWARD - TABLE["oracle"]["expected_constraint"]["lam"] * COST}
    for lam in (1, 5, 20):
        entries[f"repo_lam_{lam}"] = REWARD - lam * (COST - LIMIT).clamp_min(0)
    for name, utility in entries.items():
        assert safe_rate(optimum(utility)) == pytest.approx(TABLE["oracle"][name]["safe_rate"], abs=1e-6)
        assert mean_of(optimum(utility), REWARD) == pytest.approx(TABLE["oracle"][name]["reward"], abs=1e-6)


def test_the_expected_constraint_is_met_on_average_by_a_policy_that_is_mostly_unsafe() -> None:
    expected = TABLE["oracle"]["expected_constraint"]
    policy = train("lagrangian", expected["lam"])
    assert distance(policy, optimum(REWARD - expected["lam"] * COST)) <= 0.01
    assert abs((policy * COST).sum(-1).mean().item()) <= 0.02
    assert safe_rate(policy) == pytest.approx(0.475, abs=0.01)
    assert (unsafe_of_prompts(policy) > 0.5).sum() == 30


def test_the_lambda_of_the_expected_constraint_is_learned_by_its_rule() -> None:
    policy, lams = train_lagrangian()
    expected = TABLE["oracle"]["expected_constraint"]["lam"]
    assert lams[0] == 1.0
    assert lams[-1] == pytest.approx(expected, rel=1e-3)
    assert mean_of(policy, COST) == pytest.approx(0.0, abs=1e-3)
    assert distance(policy, optimum(REWARD - expected * COST)) <= 0.01
    row = Row("PPO-Lagrangian", lams[-1], policy, None).figures
    assert row["prompts mostly unsafe"] == 30
    assert row["safe answers"] == pytest.approx(0.475, abs=0.005)


def test_repos_lambda_follows_its_recursion_while_the_policy_is_trained() -> None:
    hinges: list[float] = []

    def rule(lam: float, policy: torch.Tensor) -> float:
        hinges.append(mean_of(policy, HINGE))
        return repo_lambda(lam, hinges[-1], 0.5, 3.0)

    policy, lams = train_with("rectified", 1.0, rule, steps=200)
    for before, after, hinge in zip(lams, lams[1:], hinges, strict=False):
        assert after == min(before + 0.5 * hinge, 3.0)
    assert lams[-1] > 1.0
    assert safe_rate(policy) > safe_rate(train("rectified", 1.0, 200))


def test_lambda_of_an_always_optimal_policy_climbs_as_slowly_as_the_recursion_says() -> None:
    assert repo_lambdas((5.0,)) == {5.0: 4249}


def test_split_reaches_its_fixed_points_when_trained() -> None:
    for lam, safe, reward in ((1.0, 0.900, 0.968), (5.0, 1.000, 0.844)):
        policy = train_split(lam, 300)
        assert safe_rate(policy) == pytest.approx(safe, abs=0.001)
        assert mean_of(policy, REWARD) == pytest.approx(reward, abs=0.001)


def test_at_lambda_20_nearly_every_answer_is_safe_and_no_prompt_is_mostly_unsafe() -> None:
    row = Row("RePO", 20.0, train("rectified", 20.0), None).figures
    assert row["safe answers"] >= 0.99
    assert row["prompts mostly unsafe"] == 0
    assert math.isnan(row["TV to the closed form"])


@pytest.mark.parametrize(("lam", "safe"), [(1.0, 0.804), (5.0, 0.961), (20.0, 0.998)])
def test_the_rectified_penalty_reaches_its_closed_form(lam: float, safe: float) -> None:
    policy = train("rectified", lam)
    assert distance(policy, optimum(REWARD - lam * (COST - LIMIT).clamp_min(0))) <= 0.01
    assert safe_rate(policy) == pytest.approx(safe, abs=0.005)


@pytest.mark.parametrize(
    ("estimator", "kl_importance_weighted"), [("k1", True), ("k2", False), ("k3", True), ("full", True)]
)
def test_every_estimator_with_the_right_gradient_reaches_the_same_optimum(
    estimator: str, kl_importance_weighted: bool
) -> None:
    policy = train("rectified", 1.0, kl_estimator=estimator, kl_importance_weighted=kl_importance_weighted)
    assert distance(policy, optimum(REWARD - (COST - LIMIT).clamp_min(0))) <= 0.01


@pytest.mark.parametrize(("mode", "lam"), [("lagrangian", None), ("rectified", 1.0), ("rectified", 5.0)])
def test_kl_in_the_reward_reaches_the_same_optimum(mode: str, lam: float | None) -> None:
    """R - beta k with k = log pi_old - log pi_ref of the sampled answer, by token_signal; the loss has no KL."""
    if lam is None:
        lam = TABLE["oracle"]["expected_constraint"]["lam"]
    log_reference = REFERENCE.log()
    answers = torch.ones(PROMPTS * ANSWERS, 1, dtype=torch.bool)
    table = log_reference.clone().requires_grad_()
    optimiser = torch.optim.Adam([table], lr=0.3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 400)
    for _ in range(400):
        log_ratio = table.detach().log_softmax(-1) - log_reference
        signal = token_signal(REWARD.flatten(), answers, log_ratio.reshape(-1, 1), -BETA).reshape(PROMPTS, ANSWERS)
        baseline = (table.detach().softmax(-1) * signal).sum(-1, keepdim=True)
        cost = None if mode == "rectified" else COST
        table.grad = exact_gradient(table, mode, lam, signal - baseline, cost, beta=0.0)
        optimiser.step()
        schedule.step()
    utility = REWARD - lam * (COST if mode == "lagrangian" else (COST - LIMIT).clamp_min(0))
    assert distance(table.detach().softmax(-1), optimum(utility)) <= 0.01


def test_k3_without_the_ratio_ends_somewhere_else() -> None:
    """Its gradient is that of the reverse divergence, KL(pi_ref || pi)."""
    policy = train("lagrangian", TABLE["oracle"]["expected_constraint"]["lam"], kl_importance_weighted=False)
    assert distance(policy, optimum(REWARD - TABLE["oracle"]["expected_constraint"]["lam"] * COST)) > 0.05


def test_a_baseline_does_not_move_the_rectified_optimum() -> None:
    policy = train("rectified", 1.0, fitted_baselines=True)
    assert distance(policy, optimum(REWARD - (COST - LIMIT).clamp_min(0))) <= 0.01


@pytest.mark.parametrize(("lam", "safe", "reward"), [(1.0, 0.900, 0.968), (5.0, 1.000, 0.844)])
def test_split_with_a_fitted_critic_rests_at_a_more_conservative_policy(lam: float, safe: float, reward: float) -> None:
    """V_C = the policy's own mean cost, so there are several fixed points: this is the one that is near uniform."""
    log_policy = torch.zeros_like(REWARD)
    for _ in range(3000):
        baseline = (log_policy.softmax(-1) * COST).sum(-1, keepdim=True)
        utility = REWARD - lam * (COST > LIMIT) * (COST - baseline)
        log_policy = 0.95 * log_policy + 0.05 * (REFERENCE.log() + utility / BETA)
    policy = log_policy.softmax(-1)
    assert safe_rate(policy) == pytest.approx(safe, abs=0.001)
    assert mean_of(policy, REWARD) == pytest.approx(reward, abs=0.001)
    assert safe_rate(policy) > TABLE["oracle"][f"repo_lam_{lam:g}"]["safe_rate"] + 0.02

    # full KL: the sampled estimators are clamped at |log pi - log pi_ref| = 20, and a policy this safe is beyond it
    centred = COST - (policy * COST).sum(-1, keepdim=True)
    rectified = optimum(REWARD - lam * (COST - LIMIT).clamp_min(0))
    for table, mode, cost in ((policy, "split", centred), (rectified, "rectified", None)):
        assert exact_gradient(table.log(), mode, lam, REWARD, cost, kl_estimator="full").abs().max() < 1e-9
    assert exact_gradient(policy.log(), "rectified", lam, REWARD, None, kl_estimator="full").abs().max() > 1e-6
