"""The update on pairs: its loss and gradient are those of the formula, however the pairs are laid out."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from repo.common.errors import UserError
from repo.config.schema import AlgorithmConfig, Config, OptimizerConfig, PenaltyConfig, RolloutConfig
from repo.data.micro_batches import divide, micro_batches
from repo.data.packing import pack
from repo.data.sequences import make_sequences
from repo.models.actor import Actor
from repo.models.policy import load_policy
from repo.runs import checkpoint
from repo.scoring.scorers import Scores
from repo.training.multipliers import Multipliers
from repo.training.pairs import PairBatch, PairUpdater, make_pair_batch, pairs_in, require_pairs_in_one_pass
from tests.support.padded_forward import response_logps

PAIRS, BETA, TEMPERATURE = 5, 0.3, 0.8


@pytest.fixture
def policy(tiny_model):
    return load_policy(str(tiny_model), torch.device("cpu"), trainable=True)


def make_batch(policy):
    """Draw five pairs of responses of 1 to 9 tokens."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(5, 300, (3 + 2 * i,), generator=draw).tolist() for i in range(PAIRS) for _ in range(2)]
    prompts = [prompts[i - i % 2] for i in range(2 * PAIRS)]
    lengths = [4, 9, 1, 6, 7, 3, 3, 8, 2, 5]
    responses = [torch.randint(5, 300, (n,), generator=draw).tolist() for n in lengths]
    group = torch.arange(PAIRS).repeat_interleave(2)
    sequences = make_sequences(prompts, responses, policy.pad_id, group)
    ref_logps = -6 + torch.randn(2 * PAIRS, 9, generator=draw)
    return PairBatch(sequences, torch.rand(PAIRS, generator=draw), ref_logps, 1.0)


def make_updater(policy, budget=2048, **options):
    config = Config(
        algorithm=AlgorithmConfig(method="cdpo", beta=BETA),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        optimizer=OptimizerConfig(micro_batch_tokens=budget, **options),
    )
    return PairUpdater(Actor(policy), config)


def gradient_of(policy):
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return gradient


def written_out(policy, batch, pairs):
    """Loss, gradient and log-ratios by the formula, from a padded forward pass over all responses."""
    by_token = response_logps(policy, batch.sequences, TEMPERATURE) - batch.ref_logps
    ratios = (by_token.double() * batch.sequences.response_mask).sum(1).view(-1, 2)[pairs]
    label, better = batch.labels[pairs], torch.sigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
    loss = -(label * better.log() + (1 - label) * (1 - better).log()).mean()
    loss.backward()
    return loss.item(), gradient_of(policy), ratios.detach().float()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [8, 40, 2048])
def test_loss_and_gradient_are_the_formulas_in_every_layout(padded, budget, policy):
    batch, pairs = make_batch(policy), torch.tensor([3, 0, 4])
    loss, gradient, ratios = written_out(policy, batch, pairs)
    updater = make_updater(policy, budget)
    if padded:
        updater.actor.attention = dataclasses.replace(updater.actor.attention, packs=False, pads=True)
    passes = updater.actor.own_parts(batch.sequences, torch.arange(2 * PAIRS), budget, whole=True)
    assert (len(passes) == 1) == (budget == 2048)
    found, found_ratios = updater.backward(batch, pairs)
    assert found == pytest.approx(loss, rel=1e-5)
    assert (gradient_of(policy) - gradient).norm() <= 1e-5 * gradient.norm()
    torch.testing.assert_close(found_ratios[pairs], ratios, rtol=1e-4, atol=1e-4)
    assert found_ratios[[1, 2]].eq(0).all()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [0, 8, 24, 48, 999])
def test_a_pair_is_never_divided(padded, budget, policy):
    sequences = make_batch(policy).sequences
    rows = torch.tensor([7, 6, 0, 1, 9, 8])
    sets = micro_batches(sequences, rows, budget, True, padded=padded, whole=True)
    assert sorted(torch.cat(sets).tolist()) == sorted(rows.tolist())
    assert all((part.view(-1, 2) // 2).unique(dim=1).shape[1] == 1 for part in sets)
    if not padded:
        pairs = [(part, pack(sequences, part, True).tokens) for part in sets]
        assert all(tokens <= budget or len(part) == 2 for part, tokens in pairs)
    shares = divide(sequences, rows, 5, whole=True)
    assert sorted(torch.cat(shares).tolist()) == sorted(rows.tolist())
    assert all(torch.equal(share[::2] + 1, share[1::2]) for share in shares)


def test_the_pairs_of_a_pass_are_found_in_any_order(policy):
    sequences = make_batch(policy).sequences
    packed = pack(sequences, torch.tensor([9, 2, 8, 3]), True)
    numbers, responses = pairs_in(packed)
    assert numbers.tolist() == [1, 4]
    assert packed.order[responses].tolist() == [[2, 3], [8, 9]]
    nothing = dataclasses.replace(sequences, response_lengths=torch.zeros_like(sequences.response_lengths))
    assert [x.shape for x in pairs_in(pack(nothing, torch.tensor([0]), True))] == [(0,), (0, 2)]


def test_a_pass_without_pairs_has_gradient_0(policy):
    """As that of a process which has fewer pairs than others."""
    batch = make_batch(policy)
    updater = make_updater(policy)
    nothing = dataclasses.replace(batch.sequences, response_lengths=torch.zeros_like(batch.sequences.response_lengths))
    updater.actor.own_parts = lambda *_, **__: [pack(nothing, torch.tensor([0]), True)]
    loss, ratios = updater.backward(batch, torch.arange(PAIRS))
    assert (loss, ratios.abs().sum()) == (0.0, 0.0)
    assert gradient_of(policy).eq(0).all()


def test_updates_lower_the_loss_of_their_pairs_and_say_with_which_weights_they_met_them(policy):
    batch = dataclasses.replace(make_batch(policy), labels=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.9]))
    updater = make_updater(policy, lr=1e-3, warmup_steps=0, epochs=3)
    expected = written_out(policy, batch, torch.arange(PAIRS))
    results = [updater.update(batch, step, 6) for step in range(6)]
    torch.testing.assert_close(results[0].log_ratios, expected[2], rtol=1e-4, atol=1e-4)
    assert results[-1].loss < 0.5 * results[0].loss
    assert (results[0].skipped, results[0].lr) == (0, 1e-3)


def test_a_step_that_is_not_finite_is_left_out_and_several_in_a_row_stop_the_run(policy):
    batch = make_batch(policy)
    bad = dataclasses.replace(batch, labels=torch.full((PAIRS,), float("nan")))
    updater = make_updater(policy, max_skipped=2)
    before = [p.detach().clone() for p in policy.model.parameters()]
    assert updater.update(bad, 0, 9).skipped == 1
    assert all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), before, strict=True))
    with pytest.raises(UserError, match="2 updates in a row had a non-finite loss or gradient"):
        updater.update(bad, 1, 9)


@pytest.mark.parametrize(
    ("method", "utilities"), [("cdpo", [1.0 + 2.0 * 1.5, 1.0 - 2.0 * 0.5]), ("repo_dpo", [1.0, 1.0 - 2.0 * 0.5])]
)
def test_labels_are_those_of_the_methods_penalised_rewards(method, utilities, policy):
    sequences, algorithm = make_batch(policy).sequences, AlgorithmConfig(method=method, cost_limit=0.5)
    scores = Scores(torch.ones(2 * PAIRS), torch.tensor([-1.0, 1.0] * PAIRS))
    batch = make_pair_batch(algorithm, sequences, scores, torch.zeros(2 * PAIRS, 9), 2.0)
    expected = torch.sigmoid(torch.tensor(utilities[0] - utilities[1]))
    torch.testing.assert_close(batch.labels, expected.expand(PAIRS))


def test_lambda_of_cdpo_follows_the_mean_and_that_of_repo_dpo_the_excess():
    costs, penalty = [-4.0, 1.0, 1.5], PenaltyConfig(initial=2.0, lr=1.0, max=3.0)
    found = {}
    for method in ("cdpo", "repo_dpo"):
        multipliers = Multipliers(AlgorithmConfig(method=method, cost_limit=0.5), penalty)
        multipliers.update(costs, 0.5)
        found[method] = multipliers.lam
    assert found == {"cdpo": pytest.approx(2.0 - 1.0), "repo_dpo": 2.5}


def test_a_model_that_reads_one_response_at_a_time_is_refused():
    with pytest.raises(UserError, match="with model.path 'mamba', which reads one response at a time"):
        require_pairs_in_one_pass(SimpleNamespace(packs=False, pads=False), "mamba")
    require_pairs_in_one_pass(SimpleNamespace(packs=False, pads=True), "padded")


def test_the_best_checkpoint_is_one_whose_policy_was_sampled(tmp_path, policy):
    updater, nan = make_updater(policy), float("nan")
    saver = checkpoint.Saver(tmp_path, 1, 0.95, updater.actor.world, False)
    best = []
    for step, safe in enumerate([nan, nan, 0.3, nan, 0.2, 0.4], 1):
        records = [{"safe_rate": nan, "reward_mean": nan}, {"safe_rate": safe, "reward_mean": 1.0}]
        saver.start(checkpoint.make_state(step, {}, 0, {}, records), updater.actor, updater.optimizer)
        saver.wait()
        best.append(int((tmp_path / "checkpoints" / "best").read_text().removeprefix("step-")))
    assert best == [1, 2, 3, 3, 3, 6]
