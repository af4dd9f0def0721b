"""Responses that are cut off at the limit: kept, masked as if they were not there, or penalised by an amount."""

import dataclasses
import json

import pytest
import torch

from repo import train
from repo.config.schema import AlgorithmConfig, Config, OptimizerConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.actor import Actor
from repo.models.critic import Critic
from repo.models.policy import load_policy
from repo.rollout.gather import merge
from repo.rollout.sample import sample
from repo.scoring.scorers import Scores
from repo.training.advantages import divide_by_group_std, group_advantages
from repo.training.batch import make_batch
from repo.training.truncation import for_training
from repo.training.update import Updater
from tests.support.tiny import QUESTIONS

ROLLOUT = RolloutConfig(max_response_tokens=9)


@pytest.fixture
def policy(tiny_model):
    policy = load_policy(str(tiny_model), torch.device("cpu"), trainable=True)
    return dataclasses.replace(policy, eos_ids=tuple(range(1, 60)))  # so that some responses end and others do not


@pytest.fixture
def rollout(policy):
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS], policy.tokenizer, None, 200).kept
    rollout = sample(policy, prompts, 4, ROLLOUT, seed=0, step=0)
    assert 0.2 < rollout.truncated.double().mean() < 0.8
    return rollout


def updater_for(policy, truncated: str, advantages: str, mode: str, budget: int) -> Updater:
    torch.manual_seed(5)
    names = ("reward", "cost") if advantages == "gae" else ()
    critics = torch.nn.ModuleDict({name: Critic(64) for name in names})
    for critic in critics.values():
        torch.nn.init.normal_(critic.head.weight, std=0.1)
    config = Config(
        rollout=dataclasses.replace(ROLLOUT, truncated=truncated),
        algorithm=AlgorithmConfig(advantages=advantages, loss_agg_mode=mode, beta=0.1),
        optimizer=OptimizerConfig(micro_batch_tokens=budget),
    )
    return Updater(Actor(policy, critics), config)


def loss_and_gradient(updater: Updater, sequences, scores: Scores, ref):
    predictions = updater.predict(sequences, 0)
    batch = make_batch(updater.config, sequences, scores, ref, 1.5, 0.1, predictions)
    losses, _ = updater.accumulator.backward(batch, torch.arange(len(batch.costs)))
    gradients = [p.grad.flatten().clone() for p in updater.actor.parameters() if p.grad is not None]
    updater.optimizer.zero_grad()
    return losses, torch.cat(gradients)


def scores_of(rollout) -> Scores:
    generator = torch.Generator().manual_seed(1)
    return Scores(*(torch.randn(len(rollout.texts), generator=generator) for _ in range(2)))


def test_a_response_is_truncated_if_no_stop_token_ends_it(policy, rollout):
    for (_, ids), cut in zip(rollout.sequences.token_lists(), rollout.truncated.tolist(), strict=True):
        assert cut == (ids[-1] not in policy.eos_ids)
        assert len(ids) == 9 or not cut
    assert torch.equal(merge([rollout, rollout], 0).truncated, torch.cat([rollout.truncated] * 2))


def test_penalise_lowers_the_reward_by_the_amount_and_nothing_else(rollout):
    scores = scores_of(rollout)
    config = dataclasses.replace(ROLLOUT, truncated="penalise", truncation_penalty=0.75)
    sequences, judged = for_training(config, rollout, scores)
    assert sequences is rollout.sequences
    assert torch.equal(judged.rewards, torch.where(rollout.truncated, scores.rewards - 0.75, scores.rewards))
    assert torch.equal(judged.costs, scores.costs)


def test_keep_changes_nothing(rollout):
    scores = scores_of(rollout)
    sequences, judged = for_training(ROLLOUT, rollout, scores)
    assert sequences is rollout.sequences
    assert judged is scores


@pytest.mark.parametrize("advantages", ["group", "gae"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("budget", [1, 10**6])
def test_mask_trains_as_if_truncated_responses_were_not_there(policy, rollout, advantages, mode, budget):
    scores, ref = scores_of(rollout), rollout.logps + 0.1
    updater = updater_for(policy, "mask", advantages, mode, budget)
    sequences, judged = for_training(updater.config.rollout, rollout, scores)
    losses, gradient = loss_and_gradient(updater, sequences, judged, ref)

    counts = torch.zeros(6).index_add_(0, rollout.group, (~rollout.truncated).float())[rollout.group]
    kept = (~rollout.truncated & (counts > 1) if advantages == "group" else ~rollout.truncated).nonzero().squeeze(1)
    alone = (~rollout.truncated & (counts == 1)).any() and advantages == "group"
    assert not alone, "choose a seed whose groups have no single complete response"
    rest = rollout.sequences.select(kept)
    fewer = Scores(scores.rewards[kept], scores.costs[kept])
    other = updater_for(policy, "keep", advantages, mode, budget)
    expected, wanted = loss_and_gradient(other, rest, fewer, ref[kept, : rest.response_mask.shape[1]])
    assert losses == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


def test_baselines_are_of_counted_responses_and_one_alone_gets_zero():
    values, group = torch.tensor([1.0, 2.0, 6.0, 3.0, 5.0]), torch.tensor([0, 0, 0, 1, 1])
    counted = torch.tensor([True, False, True, True, False])
    found = group_advantages(values, group, counted)
    assert found.tolist() == [1 - 6.0, 0.0, 6 - 1.0, 0.0, 0.0]
    assert torch.allclose(divide_by_group_std(found, group, counted), torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0]))


def test_a_batch_of_truncated_responses_alone_leaves_the_weights(policy, rollout):
    updater = updater_for(policy, "mask", "group", "token-mean", 100)
    cut = dataclasses.replace(rollout, truncated=torch.ones_like(rollout.truncated))
    sequences, judged = for_training(updater.config.rollout, cut, scores_of(rollout))
    losses, gradient = loss_and_gradient(updater, sequences, judged, rollout.logps)
    assert losses["loss"] == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("truncated", ["mask", "penalise"])
def test_a_run_records_what_was_cut_off(truncated, options, tmp_path):
    run = tmp_path / "run"
    train.run_command([*options, f"--rollout.truncated={truncated}", "--steps=1", f"--out={run}"])
    record = json.loads((run / "metrics.jsonl").read_text())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert record["truncated"] == sum(s["truncated"] for s in samples) / len(samples)
