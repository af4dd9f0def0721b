"""Compute the gradient of one minibatch: the program of each process in test_processes.py, started by torchrun.

    torchrun --nproc_per_node N -m tests.support.programs.processes OUT SHARD MODEL OPTION...

The first process writes the loss and the whole gradient to OUT, a file that torch.load reads.
"""

import sys
from pathlib import Path

import torch

from repo.common.distributed import World, joined
from repo.config.parse import make_parser, parse_config
from repo.config.schema import Config
from repo.data.prompts import Example
from repo.data.sequences import make_sequences
from repo.models.actor import Actor, predict
from repo.models.critic import Critic
from repo.models.policy import load_policy
from repo.models.sharding import is_sharded
from repo.scoring.scorers import Scores
from repo.setup import shards_of
from repo.training.accumulation import Accumulator
from repo.training.batch import make_batch


def random_batch(policy, config: Config):
    """Draw five prompts with two or three responses of 0 to 9 tokens each.

    Returns the sequences, and the function from predictions of policy and critics to a batch of them.
    """
    draw = torch.Generator().manual_seed(0)
    group = torch.tensor([0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4])
    prompts = [torch.randint(5, 300, (3 + 2 * g,), generator=draw).tolist() for g in range(5)]
    lengths = [4, 9, 0, 1, 7, 3, 3, 8, 2, 5, 6]
    responses = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in lengths]
    sequences = make_sequences([prompts[g] for g in group.tolist()], responses, policy.pad_id, group)
    rewards, costs = torch.randn(2, 11, generator=draw)
    ref_logps = -6 + torch.randn(11, 9, generator=draw)
    return sequences, lambda predictions: make_batch(
        config, sequences, Scores(rewards, costs), ref_logps, 2.0, 0.1, predictions
    )


def gradient(world: World, config: Config, model: str) -> dict:
    """Compute losses and gradients of a minibatch of 9 of the 11 responses, with critics and supervised examples."""
    policy = load_policy(model, torch.device("cpu"), True, config.model)
    signals = ("reward", "cost") if config.algorithm.advantages == "gae" else ()
    critics = torch.nn.ModuleDict({signal: Critic(policy.model.config.hidden_size) for signal in signals})
    for i, critic in enumerate(critics.values()):
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(i))
    actor = Actor(policy, critics, world, shards_of(config, world))
    sequences, batch_of = random_batch(policy, config)
    predictions = predict(actor, sequences, config.rollout.temperature, config.optimizer.micro_batch_tokens)
    batch = batch_of(predictions)
    accumulator = Accumulator(actor, config)
    rows, seen = torch.tensor([9, 0, 1, 2, 4, 5, 7, 3, 8]), torch.zeros_like(predictions.logps)
    losses, stats = accumulator.backward(batch, rows, seen)
    examples = [Example((7, 8, 9), (5, 6)), Example((9,), (8, 7, 5)), Example((6, 6), (1,))]
    losses["ptx_loss"] = accumulator.supervised_backward(examples)
    if not actor.sharded:
        world.sum_gradients(list(actor.parameters()))
    gradients = {
        name: p.grad.full_tensor() if is_sharded(p.grad) else p.grad
        for name, p in actor.named_parameters()
        if p.grad is not None
    }
    found_by_one = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    if world.rank == world.size - 1:  # only one process has seen the first
        found_by_one[0].grad = torch.full((3,), 2.0)
    world.sum_gradients(found_by_one)
    advantage = batch.advantages.combined.abs().mean().item()
    found = {"losses": losses, "stats": stats.tensor, "gradients": gradients, "logps": seen, "old": predictions.logps}
    found["found by one"] = [None if p.grad is None else p.grad for p in found_by_one]
    return {**found, "advantage": advantage, "values": predictions.values}


def config_of(options: list[str]) -> Config:
    return parse_config(make_parser("test", ""), [*options, "--rollout.prompts_per_step=5"])


def main() -> None:
    torch.set_num_threads(1)
    out, model, *options = sys.argv[1:]
    config = config_of(options)
    with joined(lambda: torch.device("cpu")) as world:
        found = gradient(world, config, model)
        if world.first:
            torch.save(found, Path(out))


if __name__ == "__main__":
    main()
