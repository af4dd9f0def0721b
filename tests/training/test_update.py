"""The update: invariant to the micro-batch split, guarded against non-finite gradients, scheduled as configured."""

import dataclasses
import math

import pytest
import torch

from repo.common.distributed import ALONE
from repo.common.errors import UserError
from repo.config.schema import AlgorithmConfig, Config, OptimizerConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.actor import Actor
from repo.models.policy import load_policy
from repo.rollout.sample import sample
from repo.runs import checkpoint
from repo.training.advantages import Advantages
from repo.training.batch import Batch
from repo.training.optimizer import lr_at
from repo.training.update import Updater
from repo_kernels.layers.bf16_linear import rounded
from tests.support.padded_forward import response_logits
from tests.support.predictions import response_logps
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), CPU, trainable=True)


def make_updater(policy, algorithm=None, optimizer=None, **more):
    config = Config(algorithm=algorithm or AlgorithmConfig(), optimizer=optimizer or OptimizerConfig(), **more)
    return Updater(Actor(policy), config)


def make_batch(policy, lam=1.5):
    prompts = tokenize_prompts(
        [Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)], policy.tokenizer, None, 200
    ).kept
    rollout = sample(policy, prompts, 2, RolloutConfig(max_response_tokens=14), seed=0, step=0)
    generator = torch.Generator().manual_seed(1)
    reward, cost, costs = (torch.randn(len(rollout.texts), generator=generator) for _ in range(3))
    ref = response_logps(policy, rollout.sequences, 1.0, 500)
    ref = ref + 0.1 * torch.randn(ref.shape, generator=generator)
    return Batch(rollout.sequences, Advantages(reward, cost, reward - lam * cost), costs, ref, lam, 0.02)


def gradient_of(policy, algorithm, batch, rows, old, budget):
    updater = make_updater(policy, algorithm, OptimizerConfig(micro_batch_tokens=budget))
    losses, stats = updater.accumulator.backward(dataclasses.replace(batch, old_logps=old, beta=algorithm.beta), rows)
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    updater.optimizer.zero_grad()
    return losses["loss"], gradient, stats


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_any_micro_batch_split_gives_the_same_loss_and_gradient(policy, mode, on_policy):
    algorithm = AlgorithmConfig(loss_agg_mode=mode, beta=0.1, entropy_coef=0.01)
    batch = make_batch(policy)
    old = None
    if not on_policy:
        old = response_logps(policy, batch.sequences, 1.0, 500)
        old = old + 0.2 * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
    rows = torch.arange(len(batch.costs))
    whole_loss, whole, whole_stats = gradient_of(policy, algorithm, batch, rows, old, 10**6)
    scale = batch.advantages.combined.abs().mean().item()
    for budget in (1, 60, 150):
        loss, gradient, stats = gradient_of(policy, algorithm, batch, rows, old, budget)
        assert abs(loss - whole_loss) <= 1e-6 * scale
        assert (gradient - whole).norm() <= 1e-5 * whole.norm()
        assert torch.allclose(stats.tensor, whole_stats.tensor, rtol=1e-4, atol=1e-4)


def test_the_gradient_is_that_of_the_loss_written_out(policy):
    batch = make_batch(policy, lam=0.7)
    rows = torch.tensor([0, 3, 4, 9])
    _, gradient, _ = gradient_of(policy, AlgorithmConfig(beta=0.3), batch, rows, None, 90)
    policy.model.zero_grad()
    part = batch.sequences.select(rows)
    logps = torch.log_softmax(response_logits(policy, part), -1).gather(-1, part.response_ids[..., None])[..., 0]
    width = logps.shape[1]
    ratio = (logps - logps.detach()).exp()
    advantage = (batch.advantages.reward - 0.7 * batch.advantages.cost)[rows][:, None]
    delta = logps - batch.ref_logps[rows, :width]
    loss = -ratio * advantage + 0.3 * ratio * ((-delta).exp() + delta - 1)
    (loss * part.response_mask).sum().div(part.response_mask.sum()).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_an_update_raises_the_log_probs_of_better_responses(policy):
    batch = dataclasses.replace(make_batch(policy, lam=0.0), beta=0.0)
    updater = make_updater(policy, None, OptimizerConfig(lr=1e-3, warmup_steps=0))
    before = response_logps(policy, batch.sequences, 1.0, 500).sum(1)
    for step in range(5):
        updater.update(batch, step, 5)
    change = response_logps(policy, batch.sequences, 1.0, 500).sum(1) - before
    advantages = batch.advantages.reward
    assert change[advantages > 0].mean() > 0 > change[advantages < 0].mean()


def test_the_first_minibatch_is_on_policy_and_later_ones_are_clipped(policy):
    batch = make_batch(policy)
    config = OptimizerConfig(lr=2e-2, warmup_steps=0, epochs=3, minibatches=2)
    updater = make_updater(policy, None, config)
    assert updater.steps_per_update == 6
    batch = dataclasses.replace(batch, old_logps=updater.predict(batch.sequences, 0).logps)
    result = updater.update(batch, 0, 1)
    assert result.stats.tokens == 3 * batch.sequences.response_lengths.sum()
    assert result.stats.clip_fraction > 0
    single = make_updater(policy).update(make_batch(policy), 0, 1)
    assert single.stats.ratio_min == single.stats.ratio_max == 1


def test_old_log_probs_are_those_of_the_sampling_policy_though_the_first_minibatch_is_not_read(policy, monkeypatch):
    batch = make_batch(policy)
    updater = make_updater(policy, None, OptimizerConfig(lr=2e-2, warmup_steps=0, epochs=2, minibatches=3))
    sampled = response_logps(policy, batch.sequences, 1.0, 500)
    old = updater.predict(batch.sequences, 4).logps
    first = next(updater._minibatches(12, 4))[0]
    others = torch.tensor([row for row in range(12) if row not in first])
    assert (old[first] == 0).all()
    assert torch.allclose(old[others], sampled[others], atol=1e-5)
    seen, backward = [], updater.accumulator.backward
    monkeypatch.setattr(
        updater.accumulator, "backward", lambda known, *more: seen.append(known.old_logps) or backward(known, *more)
    )
    updater.update(dataclasses.replace(batch, old_logps=old), 4, 9)
    assert len(seen) == 6
    assert seen[0] is None
    assert all(torch.allclose(later, sampled, atol=1e-5) for later in seen[1:])
    assert (old[first] == 0).all()


def test_a_second_epoch_over_the_whole_batch_is_off_policy_by_its_own_first_pass(policy):
    batch = make_batch(policy)
    updater = make_updater(policy, None, OptimizerConfig(lr=2e-2, warmup_steps=0, epochs=2))
    old = updater.predict(batch.sequences, 0).logps
    assert (old == 0).all()
    result = updater.update(dataclasses.replace(batch, old_logps=old), 0, 1)
    assert result.stats.tokens == 2 * batch.sequences.response_lengths.sum()
    assert result.stats.ratio_max > 1.01


def test_the_weight_of_the_kl_is_the_batchs_and_not_the_first_one(policy):
    batch, rows = make_batch(policy), torch.arange(12)
    gradients = []
    for beta, config_beta in ((0.3, 0.02), (0.3, 0.3), (0.02, 0.02)):
        updater = make_updater(policy, AlgorithmConfig(beta=config_beta))
        updater.accumulator.backward(dataclasses.replace(batch, beta=beta), rows)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.model.parameters()]))
        updater.optimizer.zero_grad()
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.allclose(gradients[0], gradients[2])


def test_a_non_finite_gradient_is_skipped_counted_and_stops_the_run(policy):
    batch = make_batch(policy)
    bad = Batch(
        batch.sequences,
        Advantages(batch.advantages.reward * torch.inf, None, batch.advantages.reward * torch.inf),
        batch.costs,
        batch.ref_logps,
        0.0,
        0.02,
    )
    updater = make_updater(policy, AlgorithmConfig(method="ppo"), OptimizerConfig(max_skipped=2))
    before = [p.detach().clone() for p in policy.model.parameters()]
    assert updater.update(bad, 0, 9).skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))
    updater.update(
        Batch(
            batch.sequences,
            Advantages(batch.advantages.reward, None, batch.advantages.reward),
            batch.costs,
            batch.ref_logps,
            0.0,
            0.02,
        ),
        1,
        9,
    )
    assert updater.skipped_in_a_row == 0
    updater.update(bad, 2, 9)
    with pytest.raises(UserError, match="2 updates in a row had a non-finite loss or gradient"):
        updater.update(bad, 3, 9)


def test_responses_of_length_zero_train(policy):
    batch = make_batch(policy)
    lengths = batch.sequences.response_lengths.clone()
    lengths[::2] = 0
    sequences = type(batch.sequences)(
        batch.sequences.input_ids,
        batch.sequences.prompt_lengths,
        lengths,
        batch.sequences.prompt_width,
        batch.sequences.group,
    )
    updater = make_updater(policy, None, OptimizerConfig(micro_batch_tokens=60))
    result = updater.update(Batch(sequences, batch.advantages, batch.costs, batch.ref_logps, 1.0, 0.02), 0, 1)
    assert result.skipped == 0
    assert math.isfinite(result.losses["loss"])
    empty = type(sequences)(
        sequences.input_ids, sequences.prompt_lengths, lengths * 0, sequences.prompt_width, sequences.group
    )
    result = updater.update(Batch(empty, batch.advantages, batch.costs, batch.ref_logps, 1.0, 0.02), 0, 1)
    assert result.losses["loss"] == 0.0


def test_learning_rates_warm_up_and_decay():
    constant = OptimizerConfig(lr=1.0, warmup_steps=3)
    assert [lr_at(s, 10, constant) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    cosine = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="cosine")
    assert lr_at(0, 10, cosine) == 1.0
    assert lr_at(5, 10, cosine) == pytest.approx(0.5)
    linear = OptimizerConfig(lr=1.0, warmup_steps=0, schedule="linear")
    assert lr_at(7, 10, linear) == pytest.approx(0.3)


def test_weight_decay_leaves_vectors_alone(policy):
    groups = make_updater(policy, None, OptimizerConfig(weight_decay=0.1)).optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.ndim < 2 for p in groups[1]["params"])


def test_kl_in_the_reward_leaves_the_loss_without_a_kl(policy):
    batch, rows = make_batch(policy), torch.arange(4)
    _, with_beta, _ = gradient_of(policy, AlgorithmConfig(beta=0.5, kl_placement="reward"), batch, rows, None, 500)
    _, without, _ = gradient_of(policy, AlgorithmConfig(beta=0.0), batch, rows, None, 500)
    assert torch.equal(with_beta, without)


def test_a_checkpoint_brings_back_weights_and_the_random_state(policy, tmp_path):
    updater = make_updater(policy)
    records = [{"safe_rate": 0.5, "reward_mean": 0.0}]
    saver = checkpoint.Saver(tmp_path, 1, 0.9, ALONE, sharded=False)
    saver.start(checkpoint.make_state(1, {}, 0, {}, records), updater.actor, updater.optimizer)
    saver.wait()
    expected, weight = torch.rand(3), policy.model.model.norm.weight.detach().clone()
    with torch.no_grad():
        policy.model.model.norm.weight.add_(1)
    checkpoint.restore(tmp_path / "checkpoints" / "step-000001", updater.actor, updater.optimizer)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(policy.model.model.norm.weight, weight)


def test_rounded_copies_follow_an_optimiser_that_writes_into_data(policy):
    """As bitsandbytes does: PyTorch counts no new version of the weight."""
    updater, weight = make_updater(policy), policy.model.model.layers[0].mlp.up_proj.weight
    before, step = rounded(weight), updater.optimizer.step
    version = weight._version

    def write() -> None:
        weight.data.add_(1.0)

    updater.optimizer.step = write
    updater.update(make_batch(policy), 0, 1)
    updater.optimizer.step = step
    assert weight._version == version
    assert torch.equal(rounded(weight), weight.bfloat16())
    assert not torch.equal(rounded(weight), before)
