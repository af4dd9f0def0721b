"""The recipes of the pages, as they stand there, on what OpenRLHF and prime-rl pass."""

from types import SimpleNamespace

import pytest
import torch

from tests.docs.pages import read, run_blocks

REWARDS = (1.0, 2.0, 4.0, 0.0, -1.0, 3.0)
COSTS = (1.5, -2.0, 0.25, 3.0, 0.0, -1.0)
LIMIT = 0.125
EXCESS = [max(c - LIMIT, 0.0) for c in COSTS]


def centred(values):
    return [v - sum(values) / len(values) for v in values]


def combined(rewards, excess, lam):
    """Return A_R - lambda A_C of one prompt's responses."""
    return [a - lam * c for a, c in zip(centred(rewards), centred(excess), strict=True)]


@pytest.fixture
def experiences():
    """Two micro-batches of openrlhf 0.11.2 with responses of two prompts, three each; `index` is their place."""
    rows = ([0, 4, 2], [1, 5, 3])
    return [
        SimpleNamespace(
            index=ids,
            rewards=torch.tensor([REWARDS[i] for i in ids]),  # (B,)
            action_mask=torch.ones(3, 5, dtype=torch.int64),  # (B, A)
            info={"cost": torch.tensor([COSTS[i] for i in ids], dtype=torch.float64), "reward": torch.zeros(3)},
        )
        for ids in rows
    ]


def openrlhf_advantages(experiences, n):
    """Return the advantages by place that its estimator `reinforce_baseline` forms of the rewards."""
    rewards = torch.empty(len(REWARDS))
    for one in experiences:
        rewards[one.index] = one.rewards
    groups = rewards.reshape(-1, n)
    return (groups - groups.mean(-1, keepdim=True)).flatten()


def test_the_recipe_for_openrlhf_gives_the_advantages_of_reward_and_rectified_cost(experiences):
    penalty = run_blocks(read("docs/integrations/openrlhf.md"))["Penalty"](cost_limit=LIMIT, lam=1.5)
    penalty.begin(experiences)
    expected = combined(REWARDS[:3], EXCESS[:3], 1.5) + combined(REWARDS[3:], EXCESS[3:], 1.5)
    assert openrlhf_advantages(experiences, 3).tolist() == pytest.approx(expected, abs=1e-6)
    assert [one.rewards.dtype for one in experiences] == [torch.float32] * 2


def test_the_recipe_for_openrlhf_without_lambda_leaves_the_rewards(experiences):
    penalty = run_blocks(read("docs/integrations/openrlhf.md"))["Penalty"](cost_limit=LIMIT, lam=0.0)
    before = [one.rewards.clone() for one in experiences]
    penalty.begin(experiences)
    assert all(torch.equal(one.rewards, old) for one, old in zip(experiences, before, strict=True))


def test_the_recipe_for_openrlhf_moves_lambda_after_the_losses(experiences):
    penalty = run_blocks(read("docs/integrations/openrlhf.md"))["Penalty"](LIMIT, lam=1.5, lam_lr=0.4, lam_max=1.8)
    penalty.begin(experiences)
    assert penalty.lam == 1.5
    mean = sum(EXCESS) / 6
    log = penalty.finish()
    assert log == pytest.approx({"lam": 1.5, "rectified_cost": mean, "safe_rate": 3 / 6})
    assert penalty.lam == pytest.approx(1.5 + 0.4 * mean)
    penalty.finish()
    assert penalty.lam == 1.8


def rollouts(rows):
    """Return rollouts of one prompt with what the recipe reads of prime-rl's."""
    return [SimpleNamespace(reward=REWARDS[i], metrics={"cost": COSTS[i], "length": 3.0}) for i in rows]


def test_the_recipe_for_prime_rl_gives_one_advantage_a_rollout_and_moves_lambda_with_the_batch():
    names = run_blocks(read("docs/integrations/prime-rl.md"))
    advantage, state = names["repo_advantage"], names["state"]
    lam = state["lam"]
    options = {"cost_limit": LIMIT, "lam_lr": 0.4, "groups_per_step": 2}
    for rows in ([0, 1, 2], [3, 4]):  # a group may have lost a rollout
        assert state["lam"] == lam
        got = advantage(rollouts(rows), **options)
        expected = combined([REWARDS[i] for i in rows], [EXCESS[i] for i in rows], lam)
        assert got == pytest.approx(expected, abs=1e-6)
        assert all(isinstance(value, float) for value in got)
    assert state["lam"] == pytest.approx(lam + 0.4 * sum(EXCESS[:5]) / 5)
    assert state["groups"] == 0
    lam = state["lam"]
    for rows in ([0, 3], [5, 5]):
        advantage(rollouts(rows), **options)
    assert state["lam"] == pytest.approx(lam + 0.4 * (EXCESS[0] + EXCESS[3]) / 4)  # of this batch alone
    for _ in range(2):
        advantage(rollouts([0, 3]), lam_lr=100.0, lam_max=3.0, groups_per_step=2)
    assert state["lam"] == 3.0
