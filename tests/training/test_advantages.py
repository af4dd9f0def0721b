"""Advantages and the lambda rules against hand-computed values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repo.config.schema import AlgorithmConfig, CriticConfig, PenaltyConfig
from repo.scoring.safety import rectified_cost
from repo.training.advantages import (
    crpo_advantages,
    divide_by_group_std,
    gae,
    group_advantages,
    method_advantages,
    rectified_advantages,
    token_signal,
)
from repo.training.multipliers import Multipliers, adapted_beta, lagrangian_lambda, repo_lambda

GROUP = torch.tensor([0, 0, 0, 1, 1])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    values = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0])
    expected = torch.tensor([1 - 4.0, 2 - 3.5, 6 - 1.5, 3 - 5.0, 5 - 3.0])
    assert torch.equal(group_advantages(values, GROUP), expected)


def test_groups_may_be_interleaved_and_have_any_labels():
    values = torch.tensor([1.0, 3.0, 2.0, 5.0, 6.0])
    shuffled = group_advantages(values, torch.tensor([9, 4, 9, 4, 9]))
    assert torch.allclose(shuffled, torch.tensor([-3.0, -2.0, -1.5, 2.0, 4.5]))


def test_a_single_response_has_no_baseline():
    with pytest.raises(ValueError, match="at least 2 responses per prompt"):
        group_advantages(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 0, 1]))


def test_the_rectifier_acts_before_the_mean():
    costs = torch.tensor([-4.0, 2.0])
    assert rectified_cost(costs, 0.0).mean() == 1.0
    assert rectified_cost(costs.mean(), 0.0) == 0.0


def test_cost_at_the_limit_is_safe():
    costs = torch.tensor([1.0, 1.0 + 1e-6])
    gated = rectified_advantages(torch.zeros(2), torch.ones(2), costs, 2.0, "split", cost_limit=1.0)
    assert gated.tolist() == [0.0, -2.0]


ALGORITHMS = {
    "ppo": AlgorithmConfig(method="ppo"),
    "rectified": AlgorithmConfig(),
    "split": AlgorithmConfig(cost_mode="split"),
    "lagrangian": AlgorithmConfig(method="ppo_lagrangian"),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # rewards 0, 1; costs -2, 4; lambda 3; limit 0
        ("ppo", [-1.0, 1.0]),
        ("rectified", [-1 + 3 * 4.0, 1 - 3 * 4.0]),
        ("split", [-1.0, 1 - 3 * 6.0]),
        ("lagrangian", [-1 + 3 * 6.0, 1 - 3 * 6.0]),
    ],
)
def test_modes_combine_the_signals(name, expected):
    mask = torch.tensor([[True, False], [True, True]])
    rewards, costs, group = torch.tensor([0.0, 1.0]), torch.tensor([-2.0, 4.0]), torch.tensor([0, 0])
    found = method_advantages(ALGORITHMS[name], CriticConfig(), rewards, costs, group, mask, 3.0)
    assert found.combined.tolist() == expected
    assert found.returns == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # one token, then two; V_R = 0.5 everywhere, V_C = 1 everywhere; gamma = lambda = 1, so A_t = u_T - V_t
        ("ppo", [[-0.5, 0.0], [0.5, 0.5]]),
        ("rectified", [[-0.5 - 3 * (0 - 1.0), 0.0], [0.5 - 3 * (4 - 1.0)] * 2]),
        ("split", [[-0.5, 0.0], [0.5 - 3 * (4 - 1.0)] * 2]),
        ("lagrangian", [[-0.5 - 3 * (-2 - 1.0), 0.0], [0.5 - 3 * (4 - 1.0)] * 2]),
    ],
)
def test_critics_give_an_advantage_to_each_token(name, expected):
    mask = torch.tensor([[True, False], [True, True]])
    rewards, costs, group = torch.tensor([0.0, 1.0]), torch.tensor([-2.0, 4.0]), torch.tensor([0, 1])
    values = {"reward": torch.full((2, 2), 0.5), "cost": torch.full((2, 2), 1.0)}
    critic = CriticConfig(gae_lambda=1.0)
    found = method_advantages(ALGORITHMS[name], critic, rewards, costs, group, mask, 3.0, values=values)
    assert found.combined.tolist() == expected
    assert found.returns["reward"].tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert ("cost" in found.returns) == (name != "ppo")
    if name == "rectified":  # both critics learn from every sample, safe or not
        assert found.returns["cost"].tolist() == [[0.0, 0.0], [4.0, 4.0]]
    elif name != "ppo":
        assert found.returns["cost"].tolist() == [[-2.0, 0.0], [4.0, 4.0]]


def test_the_kl_in_reward_and_cost_by_hand():
    """Two responses of one prompt; k sums to 0.5 - 1 and to 2."""
    mask = torch.tensor([[True, True], [True, False]])
    log_ratio = torch.tensor([[0.5, -1.0], [2.0, torch.nan]])
    rewards, costs, group = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 2.0]), torch.tensor([0, 0])
    reward = [3 - 0.1 * -0.5, 1 - 0.1 * 2.0]
    for placement, cost in (("reward", [-1.0, 2.0]), ("reward-and-cost", [-1 + 0.1 * -0.5, 2 + 0.1 * 2.0])):
        algorithm = AlgorithmConfig(cost_mode="split", kl_placement=placement)
        found = method_advantages(algorithm, CriticConfig(), rewards, costs, group, mask, 1.0, log_ratio, 0.1)
        assert torch.allclose(found.reward, torch.tensor([reward[0] - reward[1], reward[1] - reward[0]]))
        assert torch.allclose(found.cost, torch.tensor([cost[0] - cost[1], cost[1] - cost[0]]))


def test_normalize_divides_by_one_plus_lambda():
    plain = rectified_advantages(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1.0]), 3.0, "rectified")
    scaled = rectified_advantages(
        torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([1.0]), 3.0, "rectified", normalize=True
    )
    assert scaled == plain / 4


def test_group_std_is_ddof_zero_and_a_constant_group_gives_zero():
    found = divide_by_group_std(torch.tensor([1.0, -1.0, 0.0, 2.0, 2.0]), GROUP)
    std = math.sqrt(2 / 3)
    assert torch.allclose(found, torch.tensor([1 / std, -1 / std, 0.0, 0.0, 0.0]), atol=1e-5)


def test_repo_lambda_rises_by_the_rectified_cost_and_is_capped():
    assert repo_lambda(1.0, 0.5, 0.1, 5.0) == 1.05
    assert repo_lambda(4.99, 1.0, 0.1, 5.0) == 5.0
    assert repo_lambda(1.0, 0.0, 0.1, 5.0) == 1.0


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_repo_lambda_refuses_what_is_no_mean_of_a_hinge(cost):
    with pytest.raises(ValueError, match=r"rectified_cost must be finite and >= 0, the mean of \{C - d\}\^\+; got"):
        repo_lambda(1.0, cost, 0.1, 5.0)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_masks_are_of_any_dtype(dtype):
    signals, values = torch.tensor([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]]), torch.zeros(2, 3)
    mask, scores = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([1.0, 2.0])
    expected = gae(signals, values, mask.bool()), token_signal(scores, mask.bool(), signals, -0.5)
    found = gae(signals, values, mask.to(dtype)), token_signal(scores, mask.to(dtype), signals, -0.5)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert torch.equal(found[1], expected[1])
    u, counted = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([1, 1, 0, 1, 1])
    for function in (group_advantages, divide_by_group_std):
        assert torch.equal(function(u, GROUP, counted.to(dtype)), function(u, GROUP, counted.bool()))


def test_a_mask_of_other_values_or_another_shape_is_named():
    with pytest.raises(ValueError, match="mask must hold 0 and 1 alone; got 2"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[1, 2]]))
    with pytest.raises(ValueError, match=r"mask must have shape \(1, 2\); got \(2,\)"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="counted must hold 0 and 1 alone; got 0.5"):
        group_advantages(torch.zeros(5), GROUP, torch.tensor([1, 1, 0.5, 1, 1]))


def test_lagrangian_lambda_falls_when_the_mean_is_met():
    assert lagrangian_lambda(1.0, -1.0, 0.0, 0.1, 5.0) == pytest.approx(math.exp(-0.1))
    assert lagrangian_lambda(2.0, 3.0, 1.0, 0.1, 50.0) == pytest.approx(math.exp(math.log(2) + 0.1 * 2 * 2))
    assert lagrangian_lambda(4.9, 100.0, 0.0, 0.1, 5.0) == pytest.approx(5.0)


def test_lagrangian_penalty_uses_a_window_of_costs():
    penalty = Multipliers(AlgorithmConfig(method="ppo_lagrangian"), PenaltyConfig(lr=0.1, max=5.0))
    penalty.update([1.0] * 128, 1.0)
    after_first = penalty.lam
    penalty.update([-2.0] * 96, 0.0)  # the window now holds 32 times 1 and 96 times -2
    assert penalty.lam == pytest.approx(lagrangian_lambda(after_first, -1.25, 0.0, 0.1, 5.0))


@pytest.mark.parametrize(("method", "value"), [("ppo", 0.0), ("fixed_penalty", 1.0)])
def test_ppo_and_fixed_penalty_never_move_lambda(method, value):
    penalty = Multipliers(AlgorithmConfig(method=method), PenaltyConfig())
    penalty.update([5.0] * 10, 5.0)
    assert penalty.lam == value


def test_penalty_state_goes_on_where_it_was():
    first = Multipliers(AlgorithmConfig(method="ppo_lagrangian"), PenaltyConfig())
    first.update([1.0, 2.0, 3.0], 2.0)
    second = Multipliers(AlgorithmConfig(method="ppo_lagrangian"), PenaltyConfig())
    second.load_state_dict(first.state_dict())
    first.update([0.5], 0.5)
    second.update([0.5], 0.5)
    assert first.lam == second.lam != 1.0


def test_lagrangian_lambda_recovers_from_a_step_that_underflows():
    lam = lagrangian_lambda(1.0, -50.0, 0.0, 100.0, 5.0)
    assert lam == 0.0
    assert 0 <= lagrangian_lambda(lam, 50.0, 0.0, 100.0, 5.0) < 5


def gae_by_definition(signal: list[float], value: list[float], discount: float, trace: float) -> list[float]:
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, in Python floats."""
    deltas = [u + discount * (value[t + 1] if t + 1 < len(value) else 0.0) - value[t] for t, u in enumerate(signal)]
    return [
        sum((discount * trace) ** (later - t) * deltas[later] for later in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.floats(0.5, 1), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_gae_is_its_definition_on_ragged_batches(lengths, discount, trace, seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(1, *lengths, 1)
    signals, values = torch.randn(2, len(lengths), width, generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    signals, values = signals.masked_fill(~mask, torch.nan), values.masked_fill(~mask, torch.inf)
    advantages, returns = gae(signals, values, mask, discount, trace)
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for row, n in enumerate(lengths):
        by_hand = gae_by_definition(signals[row, :n].tolist(), values[row, :n].tolist(), discount, trace)
        expected[row, :n] = torch.tensor(by_hand, dtype=torch.float64)
    assert (advantages - expected).abs().max() <= 1e-6 * max(1.0, expected.abs().max().item())
    assert torch.allclose(returns[mask], (advantages + values)[mask])
    assert (returns[~mask] == 0).all()


def test_with_no_discount_and_full_trace_the_return_is_the_sum_to_come():
    signals = torch.tensor([[1.0, 2.0, 4.0]])
    _, returns = gae(signals, torch.tensor([[0.3, -0.7, 0.1]]), torch.ones(1, 3, dtype=torch.bool), 1.0, 1.0)
    assert torch.allclose(returns, torch.tensor([[7.0, 6.0, 4.0]]))


def test_the_score_arrives_at_the_last_token_and_the_kl_at_each():
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    log_ratio = torch.tensor([[0.5, -1.0, torch.nan], [1.0, 2.0, 3.0], [torch.nan] * 3])
    signal = token_signal(torch.tensor([3.0, -1.0, 7.0]), mask, log_ratio, -0.5)
    assert signal[:2].tolist() == [[-0.25, 3.5, 0.0], [-0.5, -1.0, -1 - 1.5]]
    assert signal[2].sum() == 7  # an empty response keeps its score for the baseline of its group


def test_beta_moves_towards_the_target_kl_by_at_most_two_percent():
    assert adapted_beta(1.0, 0.11, 0.1) == pytest.approx(1.01)
    assert adapted_beta(1.0, 50.0, 0.1) == pytest.approx(1.02)
    assert adapted_beta(2.0, 0.0, 0.1) == pytest.approx(1.96)
    penalty = Multipliers(AlgorithmConfig(kl_target=0.1), PenaltyConfig())
    penalty.update([0.0], 0.0, kl=0.3)
    assert penalty.beta == pytest.approx(0.02 * 1.02)
    constant = Multipliers(AlgorithmConfig(), PenaltyConfig())
    constant.update([0.0], 0.0, kl=0.3)
    assert constant.beta == 0.02


def test_crpo_takes_a_reward_step_only_while_the_mean_cost_is_met():
    reward, cost = torch.tensor([1.0, -1.0]), torch.tensor([2.0, -2.0])
    met, unmet = torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 1.0])
    assert torch.equal(crpo_advantages(reward, cost, met, 0.0, 0.0), reward)
    assert torch.equal(crpo_advantages(reward, cost, unmet, 0.0, 0.1), -cost)
    assert torch.equal(crpo_advantages(reward, cost, unmet, 0.0, 0.5), reward)


def test_scores_of_another_shape_and_a_cost_that_is_not_reduced_are_named():
    with pytest.raises(ValueError, match=r"group shape \(B,\), for B responses; got \(2, 4\) and \(8,\)"):
        group_advantages(torch.zeros(2, 4), torch.arange(8))
    with pytest.raises(ValueError, match=r"got \(4,\) and \(3,\)"):
        divide_by_group_std(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"^rectified_cost must be one number, .*; got shape \(3,\)"):
        repo_lambda(1.0, torch.zeros(3), 0.1, 5.0)
    assert type(repo_lambda(1.0, torch.tensor(0.5), 0.1, 5.0)) is float
