"""Critics and supervised examples: losses by hand, starts, independence of the split, and what they may not move."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from repo.common.errors import UserError
from repo.config.schema import (
    AlgorithmConfig,
    Config,
    CriticConfig,
    OptimizerConfig,
    PtxConfig,
    RolloutConfig,
    ScoringConfig,
)
from repo.data.packing import unflat
from repo.data.prompts import Example, Prompt, tokenize_prompts
from repo.models.actor import Actor
from repo.models.critic import Critic, explained_variance, make_critics, value_loss
from repo.models.policy import load_policy
from repo.rollout.sample import sample
from repo.scoring.scorers import Scores, load_scorers
from repo.training.batch import Batch, make_batch
from repo.training.update import Updater
from tests.support.padded_forward import response_logits
from tests.support.predictions import response_logps
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")
PAPER = AlgorithmConfig(advantages="gae", cost_mode="split", kl_placement="reward")


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), CPU, trainable=True)


@pytest.fixture
def rollout(policy):
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS], policy.tokenizer, None, 200).kept
    return sample(policy, prompts, 2, RolloutConfig(max_response_tokens=9), seed=0, step=0)


def heads(size: int) -> nn.ModuleDict:
    torch.manual_seed(5)
    critics = nn.ModuleDict({"reward": Critic(size), "cost": Critic(size)})
    for critic in critics.values():
        nn.init.normal_(critic.head.weight, std=0.1)
    return critics


def batch_for(updater: Updater, rollout, lam: float = 1.5) -> Batch:
    generator = torch.Generator().manual_seed(1)
    rewards, costs = (torch.randn(len(rollout.texts), generator=generator) for _ in range(2))
    ref = response_logps(updater.actor.lm, rollout.sequences, 1.0, 500)
    ref = ref + 0.1 * torch.randn(ref.shape, generator=generator)
    predictions = updater.predict(rollout.sequences, 0)
    return make_batch(updater.config, rollout.sequences, Scores(rewards, costs), ref, lam, 0.02, predictions)


def values_of(actor: Actor, sequences, signal: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A critic's values (N,) with their graph, and laid out as (B, R)."""
    (packed,) = actor.parts(sequences, torch.arange(len(sequences.group)), 10**6)
    found = actor(packed, lambda states, critics: critics[signal](states))
    values = torch.zeros(sequences.response_ids.shape)
    unflat(packed, found.detach(), values)
    return found, values


def gradient(module: nn.Module) -> torch.Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in module.parameters()]
    )


def test_the_value_loss_by_hand():
    values, old, returns = torch.tensor([1.0, 9.0]), torch.tensor([0.0, 1.0]), torch.tensor([3.0, 8.0])
    # token 0 moved by 1 <= 5: (1-3)^2 = 4. token 1 moved by 8, clipped to 6: max((9-8)^2, (6-8)^2) = 4. Mean 4, half 2.
    assert value_loss(values, old, returns, 5.0, 2) == 2.0
    # clip 0.5: token 0 at 0.5: max(4, 6.25); token 1 at 1.5: max(1, 42.25)
    assert value_loss(values, old, returns, 0.5, 2) == pytest.approx((6.25 + 42.25) / 4)


def test_a_value_that_is_clipped_away_from_its_return_has_no_gradient():
    values = torch.tensor([9.0, 0.2], requires_grad=True)
    old, returns = torch.zeros(2), torch.tensor([8.0, 1.0])
    value_loss(values, old, returns, 5.0, 1).backward()
    assert torch.allclose(values.grad, torch.tensor([0.0, 0.2 - 1.0]))


def test_explained_variance_is_one_for_the_truth_and_zero_for_the_mean():
    returns, mask = torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((1, 3), 2.0), returns, mask) == 0.0
    assert math.isnan(explained_variance(returns, torch.ones(1, 3), mask))


def test_heads_on_the_policy_read_its_states_and_never_move_it(policy, rollout):
    critics = heads(64)
    batch_of = rollout.sequences.select(torch.tensor([0, 1, 5]))
    found, values = values_of(Actor(policy, critics), batch_of, "reward")
    for row, ids in enumerate(batch_of.input_ids):
        real = ids[batch_of.attention_mask[row]][None]
        states = policy.model.model(real).last_hidden_state[0]
        prompt, length = int(batch_of.prompt_lengths[row]), int(batch_of.response_lengths[row])
        by_hand = (
            states[prompt - 1 : prompt - 1 + length] @ critics["reward"].head.weight[0] + critics["reward"].head.bias
        )
        assert torch.allclose(values[row, :length], by_hand, atol=1e-5)
    found.sum().backward()
    assert gradient(policy.model).abs().max() == 0
    assert gradient(critics).abs().max() > 0


def test_a_critic_that_starts_from_a_scorer_says_the_score_of_what_was_said_so_far(policy, rollout, scorer_folder):
    config = ScoringConfig(reward=str(scorer_folder), cost="tests.support.scorers:cost")
    scorers = load_scorers(config, None)
    critics = make_critics(CriticConfig(init_from="scorers"), policy, scorers, ("reward",))
    model = LlamaForSequenceClassification.from_pretrained(scorer_folder)
    _, values = values_of(Actor(policy, critics), rollout.sequences, "reward")
    for row in (0, 3):
        ids = rollout.sequences.input_ids[row][rollout.sequences.attention_mask[row]]
        prompt = int(rollout.sequences.prompt_lengths[row])
        for t in range(int(rollout.sequences.response_lengths[row])):
            with torch.no_grad():
                score = model.score(model.model(ids[None, : prompt + t]).last_hidden_state[0, -1])
            assert torch.allclose(values[row, t], score[0], atol=1e-5)
    assert all(p.requires_grad for p in critics.parameters())
    assert all(not p.requires_grad for p in scorers.only("reward").trunk.parameters())
    with pytest.raises(UserError, match="scoring.cost to be one model, neither a sum nor a function"):
        make_critics(CriticConfig(init_from="scorers"), policy, scorers, ("cost",))


def test_a_scorer_with_another_tokenizer_cannot_start_a_critic(policy, scorer_folder):
    policy.tokenizer.add_tokens(["<new>"])
    scorers = load_scorers(ScoringConfig(reward=str(scorer_folder), cost="tests.support.scorers:cost"), None)
    with pytest.raises(UserError, match="the tokenizer of scoring.reward differs from the policy's"):
        make_critics(CriticConfig(init_from="scorers"), policy, scorers, ("reward",))


@pytest.mark.parametrize("budget", [1, 60, 150])
def test_value_losses_do_not_depend_on_the_micro_batch_split(policy, rollout, budget):
    results = []
    for tokens in (10**6, budget):
        critics = heads(64)
        config = Config(algorithm=PAPER, optimizer=OptimizerConfig(micro_batch_tokens=tokens))
        updater = Updater(Actor(policy, critics), config)
        losses, _ = updater.accumulator.backward(batch_for(updater, rollout), torch.arange(12))
        results.append((losses, gradient(critics), gradient(policy.model)))
        policy.model.zero_grad()
    (losses, values, whole), (split_losses, split_values, split_whole) = results
    assert losses.keys() == {"loss", "reward_value_loss", "cost_value_loss"}
    assert all(split_losses[k] == pytest.approx(losses[k], abs=1e-6) for k in losses)
    assert (split_values - values).norm() <= 1e-5 * values.norm()
    assert (split_whole - whole).norm() <= 1e-5 * whole.norm()


def test_per_token_advantages_reach_the_loss(policy, rollout):
    updater = Updater(Actor(policy, heads(64)), Config(algorithm=PAPER))
    batch = batch_for(updater, rollout)
    rows = torch.tensor([0, 3, 4, 9])
    updater.accumulator.backward(batch, rows)
    found = gradient(policy.model)
    policy.model.zero_grad()
    part = batch.sequences.select(rows)
    logps = torch.log_softmax(response_logits(policy, part), -1).gather(-1, part.response_ids[..., None])[..., 0]
    advantages = batch.advantages.combined[rows, : logps.shape[1]]
    assert advantages.std(1).max() > 0
    (-(logps - logps.detach()).exp() * advantages * part.response_mask).sum().div(part.response_mask.sum()).backward()
    expected = gradient(policy.model)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_critics_learn_the_returns_of_a_batch(policy, rollout):
    config = Config(
        algorithm=dataclasses.replace(PAPER, kl_placement="loss"),
        critic=CriticConfig(lr=3e-2, gae_lambda=1.0),
        optimizer=OptimizerConfig(lr=1e-12),
    )
    updater = Updater(Actor(policy, heads(64)), config)
    losses = [updater.update(batch_for(updater, rollout), step, 60).losses for step in range(60)]
    for signal in ("reward", "cost"):
        assert losses[-1][f"{signal}_value_loss"] < 0.3 * losses[0][f"{signal}_value_loss"]


def test_critics_have_their_own_rate_without_schedule(policy, rollout):
    config = Config(
        algorithm=PAPER,
        critic=CriticConfig(lr=0.5),
        optimizer=OptimizerConfig(lr=1e-3, schedule="linear", warmup_steps=0),
    )
    updater = Updater(Actor(policy, heads(64)), config)
    updater.update(batch_for(updater, rollout), 5, 10)
    rates = {g["policy"]: g["lr"] for g in updater.optimizer.param_groups}
    assert rates == {True: pytest.approx(5e-4), False: 0.5}


def examples_of(policy) -> list[Example]:
    pairs = [
        ("What is bread?", "Flour and water."),
        ("Tell me a word.", "River"),
        ("Where is the sea?", "Down there, far."),
    ]
    encode = policy.tokenizer
    return [Example(tuple(encode(q).input_ids), (*encode(a).input_ids, policy.eos_ids[0])) for q, a in pairs]


def test_the_ptx_gradient_is_that_of_the_cross_entropy(policy):
    examples = examples_of(policy)
    config = Config(ptx=PtxConfig(data="x", coef=3.0), optimizer=OptimizerConfig(micro_batch_tokens=20))
    loss = Updater(Actor(policy), config, examples).accumulator.supervised_backward(examples)
    found = gradient(policy.model)
    policy.model.zero_grad()
    total, tokens = torch.zeros(()), sum(len(e.response_ids) for e in examples)
    for e in examples:
        ids = torch.tensor([[*e.prompt_ids, *e.response_ids]])
        logits = policy.model(ids).logits[0, len(e.prompt_ids) - 1 : -1]
        total = total + nn.functional.cross_entropy(logits, torch.tensor(e.response_ids), reduction="sum")
    (3.0 * total / tokens).backward()
    assert loss == pytest.approx(total.item() / tokens, rel=1e-5)
    assert (found - gradient(policy.model)).norm() <= 1e-4 * found.norm()


def test_each_supervised_example_is_used_once_per_epoch_whatever_the_minibatches(policy):
    examples = [Example((5,), (6, i)) for i in range(20)]
    config = Config(ptx=PtxConfig(data="x"), optimizer=OptimizerConfig(minibatches=3, epochs=2))
    updater = Updater(Actor(policy), config, examples)
    drawn, sizes = [], []
    for step in range(2):
        for rows, part in updater._minibatches(5, step):
            sizes.append((len(rows), len(part)))
            drawn += [e.response_ids[1] for e in part]
    assert sorted(drawn) == list(range(20))
    assert sizes == [(2, 2), (2, 2), (1, 1)] * 4


def test_ptx_joins_the_optimiser_step(policy, rollout):
    """With advantages of zero and no KL the step is the supervised one, and lowers its loss."""
    config = Config(
        algorithm=AlgorithmConfig(method="ppo", beta=0.0),
        ptx=PtxConfig(data="x", coef=1.0),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0),
    )
    updater = Updater(Actor(policy), config, examples_of(policy))
    batch = batch_for(updater, rollout)
    nothing = torch.zeros(len(batch.costs))
    still = dataclasses.replace(batch.advantages, reward=nothing, cost=None, combined=nothing)
    batch = dataclasses.replace(batch, advantages=still, beta=0.0)
    losses = [updater.update(batch, step, 8).losses["ptx_loss"] for step in range(8)]
    assert losses[-1] < losses[0] - 0.1
