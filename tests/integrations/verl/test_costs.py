"""The costs of a batch as verl's reward functions give them: advantages, statistics, lambda. verl is not needed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from repo_kernels.integrations.verl import CostConstraint, CostSettings

REWARDS = (1.0, 2.0, 4.0, 0.0, -1.0, 3.0)
COSTS = (1.5, -2.0, 0.25, 3.0, 0.0, -1.0)
# as in non_tensor_batch["uid"]: groups of three, two and one, not in a row
INDEX = np.array(["b", "a", "b", "a", "b", "c"], dtype=object)
INFOS = [{"score": r, "cost": c, "acc": True} for r, c in zip(REWARDS, COSTS, strict=True)]


def begun(padding=(False,) * 6, **fields):
    constraint = CostConstraint(CostSettings(**fields))
    return constraint, constraint.begin(INFOS, padding)


def by_hand(lam, limit, scale_by_std):
    """Return A_R - lambda A_C, written out with verl's formula of grpo for the reward minus lambda {C - d}^+."""
    penalised = [r - lam * max(c - limit, 0.0) for r, c in zip(REWARDS, COSTS, strict=True)]
    result = []
    for value, group in zip(penalised, INDEX, strict=True):
        members = [other for other, of in zip(penalised, INDEX, strict=True) if of == group]
        mean = sum(members) / len(members)
        squares = sum((other - mean) ** 2 for other in members)
        deviation = (squares / max(len(members) - 1, 1)) ** 0.5
        result.append((value - mean) / (deviation + 1e-6 if scale_by_std else 1.0))
    return result


@pytest.mark.parametrize("scale_by_std", [False, True])
@pytest.mark.parametrize(("lam", "limit"), [(0.0, 0.0), (1.5, 0.0), (1.5, -1.0)])
def test_advantages_are_of_reward_and_rectified_cost_by_group(lam, limit, scale_by_std):
    constraint, _ = begun(lam_init=lam, cost_limit=limit)
    ours = constraint.advantages(torch.tensor(REWARDS), INDEX, scale_by_std)
    assert ours.tolist() == pytest.approx(by_hand(lam, limit, scale_by_std), abs=1e-5)


def test_a_mean_cost_under_the_limit_does_not_hide_a_response_over_it():
    constraint = CostConstraint(CostSettings(lam_init=2.0))
    log = constraint.begin([{"cost": 1.0}, {"cost": -9.0}], [False, False])
    advantages = constraint.advantages(torch.zeros(2), np.array(["a", "a"]), False)
    assert advantages.tolist() == [-1.0, 1.0]
    assert log["repo/cost"] == -4.0
    assert log["repo/compensation_gap"] == log["repo/rectified_cost"] == 0.5


def test_lambda_follows_its_recursion_and_moves_in_finish_only():
    constraint, expected = CostConstraint(CostSettings(cost_limit=0.5, lam_init=0.2, lam_lr=2.0, lam_max=4.0)), 0.2
    for shift in (0.0, 1.0, -9.0, 2.0):
        infos = [{"cost": c + shift} for c in COSTS]
        log = constraint.begin(infos, [False] * 6)
        before = constraint.advantages(torch.tensor(REWARDS), INDEX, False)
        assert torch.equal(before, constraint.advantages(torch.tensor(REWARDS), INDEX, False))
        assert log["repo/lam"] == constraint.lam == pytest.approx(expected)
        excess = sum(max(c + shift - 0.5, 0.0) for c in COSTS) / 6
        assert log["repo/rectified_cost"] == pytest.approx(excess)
        assert log["repo/safe_rate"] == pytest.approx(sum(c + shift <= 0.5 for c in COSTS) / 6)
        constraint.finish()
        expected = min(expected + 2.0 * excess, 4.0)
        assert constraint.lam == pytest.approx(expected)
    assert expected == 4.0  # the bound was reached


def test_a_batch_moves_lambda_once():
    constraint, _ = begun()
    constraint.finish()
    with pytest.raises(RuntimeError, match="finish needs a batch that began; call begin first"):
        constraint.finish()


def test_padding_rows_do_not_count():
    constraint, log = begun([False, False, False, True, True, True], lam_init=0.0, lam_lr=1.0)
    assert log["repo/rectified_cost"] == pytest.approx((1.5 + 0.25) / 3)
    assert log["repo/safe_rate"] == pytest.approx(1 / 3)
    constraint.finish()
    assert constraint.lam == pytest.approx((1.5 + 0.25) / 3)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"score": 1.0, "acc": 1.0}, r"must return a dict with score and 'cost' \(cost_key\); got: score, acc"),
        ({}, r"must return a dict with score and 'cost' \(cost_key\); got: none"),
        ({"cost": float("nan")}, r"the cost of a response, 'cost' \(cost_key\), must be a finite number; got nan"),
        ({"cost": None}, "must be a finite number; got None"),
        ({"cost": "1"}, "must be a finite number; got '1'"),
    ],
)
def test_a_response_without_a_cost_is_an_error(info, message):
    with pytest.raises(ValueError, match=message):
        CostConstraint(CostSettings()).begin([{"cost": 1.0}, info], [False, False])


def test_another_key_may_hold_the_cost():
    constraint = CostConstraint(CostSettings(cost_key="harm"))
    assert constraint.begin([{"harm": np.float32(2.0)}, {"harm": 0}], [False, False])["repo/cost"] == 1.0


def test_rewards_of_another_batch_are_refused():
    constraint, _ = begun()
    with pytest.raises(ValueError, match=r"costs must have the shape of rewards, \(5,\); got \(6,\)"):
        constraint.advantages(torch.zeros(5), INDEX[:5], False)
    constraint.finish()
    with pytest.raises(ValueError, match=r"costs must have the shape of rewards, \(6,\); got None"):
        constraint.advantages(torch.zeros(6), INDEX, False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cost_limit": float("inf")}, "cost_limit must be finite"),
        ({"lam_init": 6.0}, "lam_init must be >= 0 and <= lam_max = 5.0"),
        ({"lam_init": -1.0}, "lam_init must be >= 0"),
        ({"lam_lr": -0.1}, "lam_lr must be >= 0"),
        ({"lam_max": 0.0}, "lam_max must be > 0"),
        ({"cost_key": 3}, "cost_key must be a string; got 3"),
        ({"lam_lr": "0.1"}, "lam_lr must be a float"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        CostSettings(**fields)


def test_a_checkpoint_keeps_lambda(tmp_path):
    constraint, _ = begun(lam_init=0.7)
    constraint.finish()
    constraint.save(tmp_path / "global_step_3")
    other = CostConstraint(CostSettings())
    other.load(tmp_path / "global_step_3")
    assert other.lam == constraint.lam > 0.7
    with pytest.raises(FileNotFoundError, match=r"resuming needs .*global_step_4.repo_state.json, .*; it is missing"):
        other.load(tmp_path / "global_step_4")


def test_the_package_does_not_import_verl_and_the_plugin_says_what_it_needs():
    program = """
import sys
import repo_kernels.integrations.verl
assert "verl" not in sys.modules
sys.modules["verl"] = sys.modules["transfer_queue"] = None
try:
    import repo_kernels.integrations.verl.plugin
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    wanted = "repo_kernels.integrations.verl.plugin needs verl: pip install 'repo-rlhf[verl]'"
    assert done.stdout.strip() == wanted
