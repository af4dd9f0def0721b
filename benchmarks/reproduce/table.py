"""Check the paper's claim exactly: a softmax policy over 60 prompts x 12 answers, trained with repo_loss.

    python -m benchmarks.reproduce.table                # `make demo`: prints the claim, writes to the folder demo
    python -m benchmarks.reproduce.table --out FOLDER   # writes there

Each (prompt, answer) is one row with one token, so that

    sum over answers of pi(y) (held constant) * loss per token(x, y)

has the exact policy gradient of the expectation. Nothing is sampled: what remains of the distance to the optimum, which
is known in closed form, comes from the loss.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from repo.common.errors import exit_with_sentence
from repo.training.multipliers import lagrangian_lambda, repo_lambda
from repo_kernels import repo_loss

TABLE = json.loads((Path(__file__).parent / "compensation_table.json").read_text())
REWARD, COST, REFERENCE = (torch.tensor(TABLE[name], dtype=torch.float64) for name in ("reward", "cost", "reference"))
BETA, LIMIT = TABLE["beta"], TABLE["limit"]
PROMPTS, ANSWERS = REWARD.shape
IDS = torch.arange(ANSWERS).expand(PROMPTS, ANSWERS)
HINGE = (COST - LIMIT).clamp_min(0)
STEPS, LR = 400, 0.3

Rule = Callable[[float, Tensor], float]
"""(lambda, policy (60, 12)) -> the next lambda."""


def optimum(utility: Tensor) -> Tensor:
    """Return the optimal policy, proportional to pi_ref exp(utility / beta), (60, 12)."""
    return torch.softmax(REFERENCE.log() + utility / BETA, -1)


def exact_gradient(table: Tensor, mode: str, lam: float, reward: Tensor, cost: Tensor | None, **options: Any) -> Tensor:
    """Return d(expected loss)/d(table), (60, 12).

    cost: cost advantages; None: the loss forms the hinge itself.
    """
    table = table.detach().requires_grad_()
    if options.get("kl_estimator") == "full":
        reference = {"ref_logits": REFERENCE.log()[:, None].expand(PROMPTS, ANSWERS, ANSWERS)}
    else:
        reference = {"ref_logps": REFERENCE.log()}
    per_token = repo_loss(
        table[:, None].expand(PROMPTS, ANSWERS, ANSWERS),
        IDS,
        None,
        reward,
        cost,
        costs=COST,
        cost_limit=LIMIT,
        cost_mode=mode,
        lam=lam,
        loss_agg_mode="none",
        **reference,
        **{"beta": BETA, **options},
    ).loss
    (gradient,) = torch.autograd.grad((table.detach().softmax(-1) * per_token).sum(), table)
    return gradient


def train(mode: str, lam: float, steps: int = STEPS, fitted_baselines: bool = False, **options: Any) -> Tensor:
    """Return the policy (60, 12) that Adam reaches from the reference.

    fitted_baselines: subtract the policy's mean reward.
    """
    return train_with(mode, lam, None, steps, fitted_baselines, **options)[0]


def train_with(
    mode: str, lam: float, rule: Rule | None, steps: int = STEPS, fitted_baselines: bool = False, **options: Any
) -> tuple[Tensor, list[float]]:
    """Train with lambda changed by `rule` after every step. Return the policy and the lambda of each step."""
    table = REFERENCE.log().clone().requires_grad_()
    optimiser = torch.optim.Adam([table], lr=LR, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    lams = []
    for _ in range(steps):
        baseline = (table.detach().softmax(-1) * REWARD).sum(-1, keepdim=True) if fitted_baselines else 0.0
        cost = None if mode == "rectified" else COST
        table.grad = exact_gradient(table, mode, lam, REWARD - baseline, cost, **options)
        optimiser.step()
        schedule.step()
        lams.append(lam)
        lam = lam if rule is None else rule(lam, table.detach().softmax(-1))
    return table.detach().softmax(-1), lams


def train_split(lam: float, steps: int = 500) -> Tensor:
    """Return the policy (60, 12) that cost_mode "split" reaches from uniform.

    The cost critic is fitted: V_C is the policy's mean cost. There are several fixed points; this is the one near
    uniform.
    """
    # Full KL: the sampled estimators are clamped at |log pi - log pi_ref| = 20, which a policy this safe exceeds.
    table = torch.zeros_like(REWARD)
    for _ in range(steps):
        policy = table.softmax(-1)
        centred = COST - (policy * COST).sum(-1, keepdim=True)
        table = natural_step(table, exact_gradient(table, "split", lam, REWARD, centred, kl_estimator="full"))
    return table.softmax(-1)


def natural_step(table: Tensor, gradient: Tensor) -> Tensor:
    """Return the table (60, 12) after a step down the natural gradient, with a twentieth of the way to its optimum.

    The plain gradient vanishes with the probability of an answer. gradient: exact_gradient with the full KL.
    """
    moved = table - 0.05 / BETA * gradient / table.softmax(-1).clamp_min(1e-300)
    return moved - moved.mean(-1, keepdim=True)


def distance(policy: Tensor, other: Tensor) -> float:
    """Return the total variation between two policies, averaged over prompts."""
    return (policy - other).abs().sum(-1).mean().item() / 2


def safe_rate(policy: Tensor) -> float:
    """Return the share of safe answers."""
    return (policy * (COST <= LIMIT)).sum(-1).mean().item()


def mean_of(policy: Tensor, values: Tensor) -> float:
    """Return the expectation under the policy, averaged over prompts."""
    return (policy * values).sum(-1).mean().item()


def unsafe_of_prompts(policy: Tensor) -> Tensor:
    """Return the probability of an unsafe answer to each prompt, (60,)."""
    return (policy * (COST > LIMIT)).sum(-1)


@dataclass(frozen=True)
class Row:
    """A policy (60, 12), the lambda it was trained with, and the closed form it should reach.

    oracle: None where the fixed point has no closed form.
    """

    name: str
    lam: float
    policy: Tensor
    oracle: Tensor | None

    @property
    def figures(self) -> dict[str, float]:
        """Return the columns of the table."""
        cost, hinge = mean_of(self.policy, COST), mean_of(self.policy, HINGE)
        return {
            "lambda": self.lam,
            "safe answers": safe_rate(self.policy),
            "prompts mostly unsafe": int((unsafe_of_prompts(self.policy) > 0.5).sum()),
            "E[R]": mean_of(self.policy, REWARD),
            "E[C]": cost,
            "E{C-d}+": hinge,
            "compensation gap": hinge - max(cost - LIMIT, 0),
            "TV to the closed form": math.nan if self.oracle is None else distance(self.policy, self.oracle),
        }


def train_lagrangian(steps: int = 2000, lr: float = 1.0) -> tuple[Tensor, list[float]]:
    """Train PPO-Lagrangian: lambda starts at 1 and follows the rule of Safe RLHF at the exact mean cost."""
    return train_with(
        "lagrangian", 1.0, lambda lam, p: lagrangian_lambda(lam, mean_of(p, COST), LIMIT, lr, 50.0), steps
    )


def repo_lambdas(targets: tuple[float, ...] = (5.0, 10.0), lr: float = 0.1) -> dict[float, int]:
    """Return the updates after which lambda, from 1 by RePO's rule, reaches each target, the policy always optimal."""
    lam, updates, updates_to = 1.0, 0, {}
    for target in targets:
        while lam < target:
            lam = repo_lambda(lam, mean_of(optimum(REWARD - lam * HINGE), HINGE), lr, math.inf)
            updates += 1
        updates_to[target] = updates
    return updates_to


def rows(told: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Train every method and return its row.

    Args:
        told: called with the name of each policy before it is trained.
    """
    expected = TABLE["oracle"]["expected_constraint"]["lam"]
    trained = [Row("reference", 0.0, REFERENCE, REFERENCE)]
    told("PPO")
    trained.append(Row("PPO", 0.0, train("lagrangian", 0.0), optimum(REWARD)))
    told("PPO-Lagrangian, its lambda learned")
    lagrangian, lams = train_lagrangian()
    oracle = optimum(REWARD - expected * COST)
    trained.append(Row("PPO-Lagrangian, its lambda learned", lams[-1], lagrangian, oracle))
    for lam in (1.0, 5.0, 20.0):
        told(f"RePO, lambda {lam:g}")
        trained.append(Row("RePO", lam, train("rectified", lam), optimum(REWARD - lam * HINGE)))
    for lam in (1.0, 5.0):
        told(f"RePO, cost mode split, lambda {lam:g}")
        trained.append(Row("RePO, cost mode split", lam, train_split(lam), None))
    return trained


class Progress:
    """Prints a line for each stage, with the seconds since the start. stages: their number."""

    def __init__(self, stages: int) -> None:
        self.stages, self.done, self.started = stages, 0, time.perf_counter()

    def __call__(self, stage: str) -> None:
        """Print that a stage begins."""
        self.done += 1
        print(f"[{self.done} of {self.stages}] {self.seconds:5.1f} s  {stage}", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.started


def main(argv: Sequence[str] | None = None) -> None:
    """Train every method, print the claim with its numbers, write table and figures."""
    from .table_report import print_claim, write

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the table and the figures")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # 720 numbers: threads would only wait for each other
    progress = Progress(8)
    table = rows(progress)
    progress("lambda by RePO's rule, the policy always optimal")
    updates = repo_lambdas()
    written = write(options.out, table, updates, progress.seconds)
    print_claim(table, written)


if __name__ == "__main__":
    exit_with_sentence(main)
