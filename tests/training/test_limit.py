"""The schedule of the cost limit against recursions written out, and what a moved limit does to a step."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.reproduce.table import (
    COST,
    HINGE,
    LIMIT,
    PROMPTS,
    REFERENCE,
    REWARD,
    distance,
    exact_gradient,
    mean_of,
    natural_step,
    optimum,
)
from repo.config.schema import AlgorithmConfig, Config, CriticConfig, PenaltyConfig
from repo.data.packing import pack
from repo.data.sequences import make_sequences
from repo.models.actor import Predictions
from repo.scoring.safety import summarize
from repo.scoring.scorers import Scores
from repo.training.advantages import method_advantages
from repo.training.batch import make_batch
from repo.training.limit import INTEGRAL, PROPORTIONAL, START_QUANTILE, TARGET, WINDUP, LimitSchedule
from repo.training.loss import make_targets
from repo.training.multipliers import Multipliers, interior_point_lambda, lagrangian_lambda
from repo_kernels.penalty import linear_limit, pi_limit


def schedule(kind: str, limit: float = 0.0, start: float | None = None, steps: int = 4) -> LimitSchedule:
    return LimitSchedule(limit, PenaltyConfig(limit_schedule=kind, limit_start=start, limit_steps=steps))


def batch(unsafe: int, limit: float, size: int = 20) -> list[float]:
    """Costs of which so many are above the limit."""
    return [limit + 1.0] * unsafe + [limit - 1.0] * (size - unsafe)


def test_a_constant_limit_never_moves_and_adds_no_metric():
    limits = schedule("constant", 0.3)
    assert limits.begin(torch.tensor([5.0, 6.0])) == 0.3
    limits.update([5.0, 6.0])
    assert limits.begin(torch.tensor([5.0, 6.0])) == limits.limit == 0.3
    assert limits.measure(torch.tensor([5.0])) == {}


def test_linear_by_hand():
    limits, seen = schedule("linear", 1.0, start=3.0), []
    for _ in range(7):
        seen.append(limits.begin(torch.tensor([9.0])))
        limits.update([9.0])
    assert seen == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]
    assert linear_limit(0.1, -0.3, 3, 3) == -0.3  # exactly


@pytest.mark.parametrize("kind", ["linear", "pi"])
def test_the_limit_begins_at_the_90th_percentile_of_the_first_batch(kind):
    costs = torch.tensor([-2.0, 0.5, 3.0, 1.0, 7.0, 0.0, 0.25, -1.0, 2.0, 4.0, -3.0])
    limits = schedule(kind)
    assert limits.begin(costs) == pytest.approx(np.quantile(costs.numpy(), 0.9)) == 4.0
    assert limits.measure(costs)["limit_unsafe_rate"] == pytest.approx(TARGET, abs=0.01)  # 1 of 11
    assert limits.begin(costs + 100) == 4.0  # a later batch does not matter
    limits.update(costs.tolist())
    assert limits.begin(costs + 100) < 4.0


@pytest.mark.parametrize("kind", ["linear", "pi"])
def test_a_reference_that_meets_the_limit_is_given_that_limit(kind):
    limits = schedule(kind, 0.5)
    for _ in range(3):
        assert limits.begin(torch.tensor([-4.0, -3.0, 0.0])) == 0.5
        limits.update([2.0, 3.0, -1.0])


def written_out(start: float, final: float, steps: int, shares: list[float]) -> list[float]:
    """The limits d_0, d_1, ... of the formula, in Python floats.

    d_{k+1} = clip(d_k - K_p (u* - u_k) - K_i S_k, final, start), S_k = clip(sum of u* - u_j, -W u*, W u*)
    """
    target, half, batches = 0.1, 0.5, 10
    k_p = half * (start - final) / (target * steps)
    k_i = half / batches * (start - final) / (target * steps)
    limits, total = [start], 0.0
    for share in shares:
        total = np.clip(total + target - share, -batches * target, batches * target)
        limits.append(float(np.clip(limits[-1] - k_p * (target - share) - k_i * total, final, start)))
    return limits


def test_pi_by_hand():
    """20 responses: none unsafe tightens, 2 unsafe (the target) leave it to the sum, many loosen up to the start."""
    unsafe = [0, 0, 2, 0, 1, 0, 3, 8, 20, 20, 20, *[0] * 22, 5, 0]
    limits, seen = schedule("pi", -0.3, start=1.7, steps=8), []
    for number in unsafe:
        seen.append(limits.begin(torch.zeros(1)))
        limits.update(batch(number, seen[-1]))
    expected = written_out(1.7, -0.3, 8, [number / 20 for number in unsafe])
    assert [*seen, limits.limit] == pytest.approx(expected, abs=1e-12)
    assert seen[1] == pytest.approx(1.7 - 2 / 8 * (0.5 + 0.05))  # half of the speed, and a tenth of the other half
    assert seen[3] < seen[2] < seen[1]
    assert seen[10] == seen[11] == 1.7  # loosened, and clipped at the start
    assert seen[-2] == -0.3  # and at the limit of the run
    assert seen[-1] == pytest.approx(-0.3 + 2 / 0.8 * (0.5 * 0.15 - 0.05 * 0.85))  # left again where it is not met


def test_the_sum_of_errors_does_not_wind_up():
    """After any time at the start with every response unsafe, a single batch without one tightens the limit."""
    limits = schedule("pi", 0.0, start=1.0)
    for _ in range(500):
        limits.begin(torch.zeros(1))
        limits.update(batch(20, limits.limit))
    assert limits.total == -WINDUP * TARGET
    limits.update(batch(0, limits.limit))
    assert limits.limit < 1.0
    total = 0.0
    for error, expected in ((0.6, 0.5), (0.6, 0.5), (-0.2, 0.3), (-2.0, -0.5)):
        limit, total = pi_limit(1.0, total, error, 0.1, 0.2, 0.5, (-9.0, 9.0))
        assert total == pytest.approx(expected)
        assert limit == pytest.approx(1.0 - 0.1 * error - 0.2 * expected)


def test_at_full_speed_pi_needs_limit_steps_steps():
    assert pytest.approx(1) == PROPORTIONAL + INTEGRAL * WINDUP
    limits, steps = schedule("pi", 0.0, start=2.0, steps=40), 0
    while limits.begin(torch.zeros(1)) > 0:
        limits.update(batch(0, limits.limit))
        steps += 1
    assert 40 <= steps <= 40 + WINDUP / 2


@pytest.mark.parametrize("kind", ["linear", "pi"])
def test_the_state_goes_on_where_it_was(kind):
    def moved(limits: LimitSchedule, numbers: list[int]) -> list[float]:
        seen = []
        for number in numbers:
            seen.append(limits.begin(torch.tensor([0.0, 1.0])))
            limits.update(batch(number, seen[-1]))
        return seen

    whole, first, second = (schedule(kind, steps=9) for _ in range(3))
    expected = moved(whole, [0, 1, 0, 5, 0, 0])
    begun = moved(first, [0, 1, 0])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert begun + moved(second, [5, 0, 0]) == expected
    constant = schedule("constant", 0.25)
    constant.load_state_dict(first.state_dict())
    assert constant.begin(torch.ones(2)) == 0.25


def test_a_state_of_an_earlier_version_has_no_limit_and_is_read():
    multipliers = Multipliers(AlgorithmConfig(), PenaltyConfig())
    multipliers.load_state_dict({"value": 3.0, "beta": 0.5, "window": []})
    assert (multipliers.lam, multipliers.beta, multipliers.limits.limit) == (3.0, 0.5, 0.0)


def test_lambda_moves_by_the_limit_of_the_step_and_metrics_by_that_of_the_run():
    costs = torch.tensor([-1.0, 0.5, 2.0, 4.0])
    penalty = PenaltyConfig(initial=1.0, lr=0.1, max=9.0, limit_schedule="linear", limit_start=1.0, limit_steps=2)
    found = {}
    for method in ("repo", "ppo_lagrangian", "interior_point"):
        multipliers = Multipliers(AlgorithmConfig(method=method), penalty)
        multipliers.limits.begin(costs)
        measured = multipliers.limits.measure(costs)
        multipliers.update(costs.tolist(), measured["limit_rectified_cost"])
        found[method] = multipliers.lam
        assert multipliers.limits.limit == 0.5  # moved after lambda
    assert measured == {"limit": 1.0, "limit_rectified_cost": 1.0, "limit_unsafe_rate": 0.5}  # (1 + 3) / 4
    assert summarize(costs, costs, torch.zeros(4), 0.0)["rectified_cost"] == 6.5 / 4
    assert found["repo"] == 1.1
    assert found["ppo_lagrangian"] == lagrangian_lambda(1.0, 5.5 / 4, 1.0, 0.1, 9.0)
    assert found["interior_point"] == interior_point_lambda(5.5 / 4, 1.0, 1 / 1.1, 9.0) == 9.0


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        # rewards 0, 1; costs 1, 4; lambda 3; limit 2 instead of 0: {C - d}+ is 0, 2
        (AlgorithmConfig(), [-1 + 3 * 2.0, 1 - 3 * 2.0]),
        (AlgorithmConfig(cost_mode="split"), [-1.0, 1 - 3 * 3.0]),
        (AlgorithmConfig(cost_mode="barrier", barrier_tau=1e-6), [-1 + 3 * 2.0, 1 - 3 * 2.0]),
        (AlgorithmConfig(method="ppo_lagrangian"), [-1 + 3 * 3.0, 1 - 3 * 3.0]),
        (AlgorithmConfig(method="crpo"), [3.0, -3.0]),
    ],
)
def test_advantages_are_those_of_the_limit_of_the_step(algorithm, expected):
    mask = torch.tensor([[True, False], [True, True]])
    signals = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0]), torch.tensor([0, 0]), mask, 3.0
    moved = method_advantages(algorithm, CriticConfig(), *signals, limit=2.0)
    assert moved.combined.tolist() == expected
    given = method_advantages(algorithm, CriticConfig(), *signals)
    assert (given.combined.tolist() != expected) == (algorithm.method == "repo")


def test_the_loss_of_a_batch_gates_by_the_limit_of_the_step():
    config = Config(algorithm=AlgorithmConfig(cost_mode="split"))
    sequences = make_sequences([[5], [5]], [[6, 7], [8]], 0, torch.tensor([0, 0]))
    scores, ref = Scores(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])), torch.zeros(2, 2)
    packed = pack(sequences, torch.arange(2), share_prefix=True)
    for limit, expected in ((None, 0.0), (2.0, 2.0)):
        made = make_batch(config, sequences, scores, ref, 3.0, 0.1, Predictions(None, {}), limit)
        assert make_targets(made, packed, config.algorithm, 3, 3).cost_limit == expected


FLAT, ORDER = COST.flatten(), COST.flatten().argsort()


def spread(policy: torch.Tensor, count: int = 500) -> torch.Tensor:
    """The costs of a batch that a policy on the table samples with no luck: its quantiles."""
    reached = (policy.flatten() / PROMPTS)[ORDER].cumsum(0)
    places = torch.searchsorted(reached, (torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return FLAT[ORDER][places.clamp_max(len(FLAT) - 1)]


def train_scheduled(kind: str, steps: int = 160) -> tuple[torch.Tensor, list[float], list[float]]:
    """Train the table by natural gradient with lambda's rule and the schedule; return policy, lambdas and limits."""
    penalty = PenaltyConfig(initial=1.0, lr=3.0, max=5.0, limit_schedule=kind, limit_steps=25)
    multipliers = Multipliers(AlgorithmConfig(cost_limit=LIMIT), penalty)
    table, lams, limits = REFERENCE.log(), [], []
    for _ in range(steps):
        policy = table.softmax(-1)
        costs = spread(policy)
        limits.append(multipliers.limits.begin(costs))
        lams.append(multipliers.lam)
        hinge = (COST - limits[-1]).clamp_min(0)
        table = natural_step(table, exact_gradient(table, "rectified", lams[-1], REWARD, hinge, kl_estimator="full"))
        multipliers.update(costs.tolist(), mean_of(policy, hinge))
    return table.softmax(-1), lams, limits


def test_on_the_table_every_schedule_ends_where_the_constant_limit_does():
    """That end is known in closed form: the optimum of the last lambda, which is the cap."""
    ends = {kind: train_scheduled(kind) for kind in ("linear", "pi")}
    for policy, lams, limits in ends.values():
        assert distance(policy, optimum(REWARD - 5 * HINGE)) <= 1e-3
        assert all(before <= after for before, after in pairwise(lams))
        assert lams[-1] == 5.0
        assert limits[-1] == LIMIT
        assert limits[0] == pytest.approx(spread(REFERENCE).quantile(START_QUANTILE).item())
        assert all(LIMIT <= limit <= limits[0] for limit in limits)
    assert all(later < 5.0 for later in ends["pi"][1][:20])
    assert sum(ends["pi"][2]) > sum(ends["linear"][2])  # pi waits for the policy
