"""Use the loss in a loop of your own: no model hub, no training loop of ours, only `repo_loss`.

A policy chooses one of 12 answers to each of 8 prompts. Reward and cost go together, so that PPO likes unsafe answers,
and prompts differ in how costly their answers are. The same loop trains with and without the penalty.

python examples/loss_only.py --lam 5 --steps 200
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from repo_kernels import repo_loss, selective_log_softmax

PROMPTS, ANSWERS, SAMPLES = 8, 12, 32


def make_task(seed: int) -> tuple[Tensor, Tensor]:
    """Draw rewards and costs, (PROMPTS, ANSWERS). An answer is safe iff its cost is <= 0."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(PROMPTS, ANSWERS, generator=generator)
    difficulty = torch.linspace(-1, 0.5, PROMPTS)[:, None]
    return reward, 0.7 * reward + 0.7 * torch.randn(PROMPTS, ANSWERS, generator=generator) + difficulty


def others_mean(values: Tensor) -> Tensor:
    """Average the other samples of a prompt: the leave-one-out baseline of each of (PROMPTS, SAMPLES) values."""
    return (values.sum(1, keepdim=True) - values) / (SAMPLES - 1)


def train(lam: float, steps: int, seed: int) -> tuple[float, float, int]:
    """Train with the penalty lam and return the reward, the safe rate and the prompts that are mostly unsafe."""
    torch.manual_seed(seed)
    reward, cost = make_task(seed)
    table = torch.zeros(PROMPTS, ANSWERS, requires_grad=True)  # logits: the whole policy
    reference = table.detach().log_softmax(-1)
    optimizer = torch.optim.Adam([table], lr=0.1)
    for _ in range(steps):
        # a response is one token here; a language model has (B, L, V) logits and (B, L) ids
        ids = torch.multinomial(table.detach().softmax(-1), SAMPLES, replacement=True)  # (PROMPTS, SAMPLES)
        logits = table[:, None, :].expand(-1, SAMPLES, -1).reshape(-1, 1, ANSWERS)
        tokens = ids.reshape(-1, 1)
        rewards, costs = reward.gather(1, ids), cost.gather(1, ids)
        hinges = costs.clamp_min(0)  # {C - d}+ with d = 0
        out = repo_loss(
            logits,
            tokens,
            selective_log_softmax(logits.detach(), tokens),  # of the policy that sampled
            reward_advantages=(rewards - others_mean(rewards)).flatten(),
            costs=costs.flatten(),
            cost_baselines=others_mean(hinges).flatten(),
            lam=lam,
            ref_logps=reference.gather(1, ids).reshape(-1, 1),
            beta=0.05,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    policy = table.detach().softmax(-1)
    safe = (policy * (cost <= 0)).sum(1)
    return (policy * reward).sum(1).mean().item(), safe.mean().item(), int((safe < 0.5).sum())


def main() -> None:
    """Train without and with the penalty, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lam", type=float, default=5.0, help="weight of the rectified cost")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for lam in (0.0, options.lam):
        reward, safe, unsafe_prompts = train(lam, options.steps, options.seed)
        print(
            f"lambda {lam:4.1f}: reward {reward:6.3f}, safe answers {safe:6.1%}, "
            f"prompts mostly unsafe {unsafe_prompts} of {PROMPTS}"
        )


if __name__ == "__main__":
    main()
