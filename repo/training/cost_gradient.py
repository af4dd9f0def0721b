"""The gradient of the expected cost with respect to a policy's weights, by the losses of training."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from repo_kernels.advantages import group_advantages

from ..config.schema import AlgorithmConfig, Config
from ..models.actor import Actor
from ..rollout.sample import Rollout
from .accumulation import Accumulator
from .advantages import Advantages
from .batch import Batch

SURROGATE = AlgorithmConfig(method="ppo", beta=0.0, loss_agg_mode="seq-mean-token-sum")
"""At a ratio of 1 its loss, -A log pi summed over tokens and averaged over responses, has the policy gradient of -A."""


def cost_gradient(actor: Actor, config: Config, rollout: Rollout, costs: Tensor) -> dict[str, Tensor]:
    """Estimate dE[C]/d theta from responses that the policy has sampled.

    It is the policy gradient of the cost, mean_i A_i d log pi(y_i)/d theta with A_i = C_i - mean of the prompt's other
    C_j. The loss of training has this gradient for the advantage -A_i, without a KL or an entropy bonus. The limit d
    has no part in it.

    Args:
        actor: policy without critics; gradients that its weights have are replaced.
        config: sampling temperature and micro-batch size are read from it.
        rollout: B responses, at least 2 to each prompt.
        costs: (B,) fp32 on the CPU.

    Returns:
        name -> gradient in the shape and dtype of each trained parameter; 0 where there is none.
    """
    actor.zero_grad(set_to_none=True)
    sequences = rollout.sequences
    advantages = -group_advantages(costs, sequences.group)
    nothing = torch.zeros(sequences.response_ids.shape)
    batch = Batch(sequences, Advantages(advantages, None, advantages), costs, nothing, lam=0.0, beta=0.0)
    accumulator = Accumulator(actor, dataclasses.replace(config, algorithm=SURROGATE))
    with actor.lm.copies():
        accumulator.backward(batch, torch.arange(len(costs)))
    trained = {name: p for name, p in actor.policy.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.detach() for name, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    return found
