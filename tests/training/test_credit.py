"""Learned credit: which token the cost came from, and what the advantages make of it."""

import dataclasses
import itertools
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from transformers import BartConfig, BartForCausalLM

from repo import train
from repo.common.errors import UserError
from repo.config.parse import make_parser, parse_config
from repo.config.schema import AlgorithmConfig, CriticConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models import credit as module
from repo.models.actor import Actor, read_reference
from repo.models.credit import Credit, costliest, make_credit
from repo.models.policy import load_policy
from repo.rollout.sample import sample
from repo.scoring.embedded import Reading
from repo.training.advantages import method_advantages, penalised_cost
from repo_kernels.advantages import cost_to_go, gae, group_advantages, token_signal
from tests.support.tiny import QUESTIONS, make_tokenizer

REDISTRIBUTED = AlgorithmConfig(credit="redistributed")
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
GROUP = torch.tensor([0, 0, 0, 1, 1, 1])


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, costs = torch.randn(2, 6, generator=generator)
    return rewards, costs, torch.rand(6, 4, generator=generator) * MASK


def advantages_of(algorithm, shares, advantages="group", values=None, **more):
    rewards, costs, _ = random_scores()
    critic = CriticConfig(gae_lambda=1.0)
    algorithm = dataclasses.replace(algorithm, advantages=advantages)
    counted = MASK.any(1) if advantages == "group" else None
    return method_advantages(
        algorithm, critic, rewards, costs, GROUP, MASK, 2.0, values=values, counted=counted, shares=shares, **more
    )


def test_a_token_answers_for_the_cost_but_for_what_came_before_it():
    found = cost_to_go(torch.tensor([3.0, 1.0]), torch.tensor([[0.5, 2.0, 0.0], [0.0, 0.0, 0.0]]))
    assert torch.equal(found, torch.tensor([[3.0, 2.5, 0.5], [1.0, 1.0, 1.0]]))
    for costs, shares in ((torch.zeros(2), torch.zeros(2)), (torch.zeros(3), torch.zeros(2, 4))):
        with pytest.raises(ValueError, match=r"costs must have shape \(B,\) and shares shape \(B, R\)"):
            cost_to_go(costs, shares)


@pytest.mark.parametrize("counted", [None, torch.tensor([1, 1, 0, 1, 1, 0])])
def test_baselines_of_tokens_are_those_of_each_column(counted):
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    found = group_advantages(values, GROUP, counted)
    expected = torch.stack([group_advantages(column, GROUP, counted) for column in values.T], 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("mode", "method"), [("rectified", "repo"), ("barrier", "repo"), ("rectified", "ppo_lagrangian")]
)
def test_without_shares_every_token_has_the_advantage_of_its_response(mode, method):
    algorithm = dataclasses.replace(REDISTRIBUTED, cost_mode=mode, method=method, cost_limit=-0.2)
    terminal, found = advantages_of(algorithm, None), advantages_of(algorithm, torch.zeros(6, 4))
    assert torch.equal(found.reward, terminal.reward)
    for name in ("cost", "combined"):
        assert torch.equal(getattr(found, name), getattr(terminal, name)[:, None] * MASK), name


def test_the_costs_of_the_tokens_add_up_to_the_cost():
    """With critics that say 0 and a trace of 1 the return of the first token is the whole cost."""
    shares, values = random_scores()[2], {"reward": torch.zeros(6, 4), "cost": torch.zeros(6, 4)}
    whole = penalised_cost(REDISTRIBUTED, random_scores()[1], 0.0)
    found = advantages_of(REDISTRIBUTED, shares, "gae", values)
    assert torch.allclose(found.returns["cost"][:, 0], whole * MASK.any(1), atol=1e-6)
    expected = cost_to_go(whole, shares) * MASK  # what is left at each token
    assert torch.allclose(found.returns["cost"], expected, atol=1e-6)
    assert torch.equal(found.returns["reward"], advantages_of(REDISTRIBUTED, None, "gae", values).returns["reward"])


def test_the_policy_gradient_is_that_of_the_cost_whatever_the_shares_are():
    """Every pair of responses of three tokens, of two kinds, with its probability: no bias, to the last digit."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    responses = list(itertools.product((0, 1), repeat=3))
    places = torch.tensor([[0, 1 + a, 3 + 2 * a + b] for a, b, _ in responses])  # a logit for each prefix
    tokens = torch.tensor(responses, dtype=torch.float64)
    logps = torch.nn.functional.logsigmoid(logits[places] * (2 * tokens - 1))
    draw = torch.Generator().manual_seed(1)
    costs = torch.randn(8, generator=draw, dtype=torch.float64)
    by_prefix = [
        {p: torch.randn((), generator=draw).item() for p in itertools.product((0, 1), repeat=n)} for n in (1, 2, 3)
    ]
    shares = torch.tensor([[by_prefix[t][r[: t + 1]] for t in range(3)] for r in responses], dtype=torch.float64)
    probabilities, rows = logps.sum(1).exp(), torch.tensor([0, 1])
    (exact,) = torch.autograd.grad(probabilities @ costs, logits, retain_graph=True)

    every = torch.ones(2, 3, dtype=torch.bool)
    values = torch.tensor([[by_prefix[t][r[: t + 1]] for t in (0, 0, 1)] for r in responses])
    values[:, 0] = 0.3  # before any token

    def grouped(costs, shares, to_go=cost_to_go):
        return group_advantages(to_go(costs, shares), torch.zeros(2, dtype=torch.int64))

    def with_critic(costs, shares):
        signal = token_signal(costs - shares.sum(1), every) + shares
        return gae(signal, values[rows], every, 1.0, 1.0)[0]

    def mean_gradient(advantages_of):
        nonlocal rows
        total = torch.zeros(())
        for i, j in itertools.product(range(8), repeat=2):
            rows = torch.tensor([i, j])
            advantages = advantages_of(costs[rows], shares[rows]).to(logps)
            weight = (probabilities[i] * probabilities[j]).detach() / 2
            total = total + weight * (advantages * logps[rows]).sum()
        return torch.autograd.grad(total, logits, retain_graph=True)[0]

    assert torch.allclose(mean_gradient(grouped), exact, atol=1e-14)
    assert torch.allclose(mean_gradient(with_critic), exact, atol=1e-6)  # gae computes in fp32

    def spread(costs, shares):  # the part that no token has a share of, in equal parts on all tokens
        each = shares + (costs - shares.sum(1))[:, None] / 3
        return each.flip(1).cumsum(1).flip(1)

    assert (mean_gradient(partial(grouped, to_go=spread)) - exact).abs().max() > 0.01  # why it stays whole


def reading_of(states):
    """A reading of rows of states {layer: [(n, H)]}, with the state of the last prompt token before each."""
    return Reading(None, [], {k: [torch.cat((row[:1], row)) for row in rows] for k, rows in states.items()}, [])


def random_states(lengths, seed=0, hidden=3):
    generator = torch.Generator().manual_seed(seed)
    return {layer: [torch.randn(n, hidden, generator=generator) for n in lengths] for layer in (0, 1)}


def head():
    return Credit((3, 3), (0, 1))


def test_one_fit_is_the_minimum_of_its_error_and_its_covariance_the_inverse_of_the_curvature():
    lengths = [4, 2, 5, 3, 4]
    states, mask = random_states(lengths), torch.arange(5) < torch.tensor(lengths)[:, None]
    costs = torch.tensor([0.0, 0.4, 1.5, 0.0, 0.9])
    learner = head()
    every = torch.cat([torch.cat((a, b), 1) for a, b in zip(*states.values(), strict=True)]).double()
    deviation = every.std(0, correction=0)
    z = (every - every.mean(0)) / (deviation + 1e-3 * deviation.mean())
    z = torch.cat((z, torch.ones(len(z), 1)), 1)
    variance = torch.tensor([128 / 6] * 6 + [1.0], dtype=torch.float64)
    bias = torch.log(torch.expm1(torch.tensor(0.04 / (sum(lengths) / 5), dtype=torch.float64)))
    before, covariance = torch.cat((torch.zeros(6), bias[None])), torch.diag(variance)
    wanted = (costs.double() - costs.min()) / costs.double().std(correction=0)

    def sums_of(weights):
        return torch.stack([part.sum() for part in torch.nn.functional.softplus(z @ weights).split(lengths)])

    for _ in range(2):  # the second begins from other weights and another covariance
        learner.fit(reading_of(states), range(5), mask, costs)
        precision = torch.linalg.inv(covariance + module.DRIFT * torch.diag(variance))
        noise = max(learner.errors[0].item(), module.LEAST_NOISE)

        def error(weights, before=before, precision=precision, noise=noise):
            change = weights - before
            return change @ precision @ change + (wanted - sums_of(weights)).square().sum() / noise

        found = learner.weights.clone().requires_grad_()
        better = torch.optim.LBFGS([found], max_iter=300, line_search_fn="strong_wolfe")

        def closure(found=found, better=better, error=error):
            better.zero_grad()
            loss = error(found)
            loss.backward()
            return loss

        better.step(closure)
        assert error(learner.weights) <= 1.02 * error(found.detach())
        assert error(learner.weights) < error(before)
        jacobian = torch.autograd.functional.jacobian(sums_of, learner.weights)
        covariance = torch.linalg.inv(precision + jacobian.T @ jacobian / noise)
        assert torch.allclose(learner.covariance, covariance, rtol=1e-5, atol=1e-6)
        before, covariance = learner.weights.clone(), learner.covariance.clone()


def test_nothing_is_learned_or_shared_before_costs_differ():
    states, mask = random_states([3, 3]), torch.ones(2, 3, dtype=torch.bool)
    learner = head()
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    for costs in (torch.zeros(2), torch.ones(2)):
        learner.fit(reading_of(states), range(2), mask, costs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())
    assert not learner.shares(reading_of(states), range(2), mask).any()


def test_responses_outside_the_mask_teach_nothing():
    states, lengths = random_states([3, 4, 2]), torch.tensor([3, 0, 2])
    mask = torch.arange(4) < lengths[:, None]
    found, expected = head(), head()
    found.fit(reading_of(states), range(3), mask, torch.tensor([0.0, 9.0, 1.0]))
    kept = {layer: [rows[0], rows[2]] for layer, rows in states.items()}
    expected.fit(reading_of(kept), range(2), mask[[0, 2]], torch.tensor([0.0, 1.0]))
    for name, tensor in found.tensors().items():
        assert torch.allclose(tensor, expected.tensors()[name], rtol=1e-12, atol=1e-12), name


def test_a_batch_in_which_nothing_counts_changes_nothing():
    states, mask = random_states([3, 3]), torch.ones(2, 3, dtype=torch.bool)
    learner = head()
    learner.fit(reading_of(states), range(2), mask, torch.tensor([0.0, 1.0]))
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    learner.fit(reading_of(states), range(2), torch.zeros_like(mask), torch.tensor([0.0, 1.0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())
    assert not learner.shares(reading_of(states), range(2), torch.zeros_like(mask)).any()


def test_a_head_that_does_not_predict_is_not_trusted():
    learner, generator = head(), torch.Generator().manual_seed(5)
    mask = torch.ones(8, 4, dtype=torch.bool)
    for step in range(30):
        reading = reading_of(random_states([4] * 8, step))
        shares = learner.shares(reading, range(8), mask)
        learner.fit(reading, range(8), mask, torch.rand(8, generator=generator))  # nothing to do with the states
    assert learner.trust < 0.2
    assert shares.sum(1).max() < 0.1


def learner_of(policy):
    learner = make_credit(REDISTRIBUTED, policy)
    assert learner is not None
    assert learner.layers == (0, 1)
    return learner


@pytest.fixture(scope="module")
def batches(tiny_model):
    """21 batches of 64 responses of 16 tokens, with readings of the reference."""
    policy = load_policy(str(tiny_model), torch.device("cpu"), trainable=False)
    questions = [Prompt(str(i), q, "") for i, q in enumerate((QUESTIONS * 2)[:8])]
    prompts = tokenize_prompts(questions, policy.tokenizer, None, 200).kept
    learner, found = learner_of(policy), []
    for step in range(21):
        rollout = sample(policy, prompts, 8, RolloutConfig(max_response_tokens=16), 0, step)
        found.append(
            (rollout.sequences, read_reference(Actor(policy), rollout.sequences, 1.0, 4096, learner.layers)[1])
        )
    return policy, found


@pytest.mark.parametrize("word", ["Please", " I", "X"])
def test_after_20_batches_nine_tenths_of_the_shares_are_on_the_token_that_costs(word, batches):
    policy, found = batches
    (token,) = policy.tokenizer.encode(word, add_special_tokens=False)
    learner = learner_of(policy)
    for sequences, reading in found:
        mask, hit = sequences.response_mask, sequences.response_ids == token
        costs = (hit & mask).sum(1).float()
        shares = learner.shares(reading, range(64), mask)
        learner.fit(reading, range(64), mask, costs)
    assert (shares * hit).sum() >= 0.9 * shares.sum()
    assert torch.allclose(shares.sum(1), costs, atol=0.35)
    named = costliest(shares, sequences, policy.tokenizer.decode)
    assert all(tokens[0][0] == word for tokens, cost in zip(named, costs.tolist(), strict=True) if cost)


def test_a_first_batch_of_nearly_equal_costs_does_not_set_the_units_for_good(batches):
    """As where the reference is nearly safe, or the first limit loose: one cost of 0.01, and then ordinary ones."""
    policy, found = batches
    (token,) = policy.tokenizer.encode("Please", add_special_tokens=False)
    learner = learner_of(policy)
    for step, (sequences, reading) in enumerate(found):
        mask, hit = sequences.response_mask, sequences.response_ids == token
        costs = (hit & mask).sum(1).float() if step else torch.tensor([0.01] + [0.0] * 63)
        shares = learner.shares(reading, range(64), mask)
        learner.fit(reading, range(64), mask, costs)
    assert (shares * hit).sum() >= 0.9 * shares.sum()
    assert learner.trust > 0.9


@pytest.mark.parametrize(("encoder", "decoder", "middle"), [(4, 2, 1), (2, 4, 2)])
def test_the_middle_layer_is_that_of_the_model_and_not_of_what_its_config_says(encoder, decoder, middle, tmp_path):
    """A decoder of an encoder-decoder family: its config gives the encoder's number of layers."""
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_start_token_id": 1}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "forced_eos_token_id": None}
    config = BartConfig(encoder_layers=encoder, decoder_layers=decoder, **ids, **heads, **sizes)
    assert config.num_hidden_layers == encoder
    BartForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), torch.device("cpu"), trainable=False)
    learner = make_credit(REDISTRIBUTED, policy)
    assert learner is not None
    assert learner.layers == (0, middle)
    assert len(learner.weights) == 2 * 16 + 1


def test_a_model_without_states_of_layers_is_refused(batches, monkeypatch):
    policy, _ = batches
    monkeypatch.setattr(module, "trunk_of", lambda model: lambda **_: SimpleNamespace(hidden_states=None))
    with pytest.raises(UserError, match=r"^algorithm\.credit: redistributed needs the states of every layer"):
        make_credit(REDISTRIBUTED, policy)


def test_tokens_with_the_largest_shares_are_named():
    sequences = make_sequences([[1], [1]], [[5, 6, 7, 8], [9]], 0)
    shares = torch.tensor([[0.1, 3.0, 0.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    found = costliest(shares, sequences, lambda ids: f"<{ids[0]}>")
    assert [[text for text, _ in row] for row in found] == [["<6>", "<8>"], []]  # 0.1 is not worth a word
    assert [share for _, share in found[0]] == pytest.approx([3.0, 0.5])
    assert costliest(torch.zeros(2, 4), sequences, str) == [[], []]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--algorithm.method=ppo"], "algorithm.credit must be terminal with method ppo; got 'redistributed'"),
        (
            ["--algorithm.cost_mode=split"],
            "algorithm.cost_mode must be rectified or barrier with algorithm.credit redistributed",
        ),
        (["--algorithm.scale_by_std=true"], "algorithm.scale_by_std must be false with algorithm.credit redistributed"),
        (
            ["--algorithm.method=repo_dpo", "--algorithm.beta=0.1"],
            "algorithm.credit must be terminal with method repo_dpo, which does not use it; got 'redistributed'",
        ),
    ],
)
def test_fields_that_do_not_go_with_learned_credit_are_refused(options, sentence):
    with pytest.raises(UserError) as raised:
        parse_config(make_parser("", ""), ["--algorithm.credit=redistributed", *options])
    assert sentence in str(raised.value)


def steps_to_safety(folder):
    """The steps after which nine in ten responses were safe, over three steps."""
    safe = [json.loads(line)["safe_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next((i + 3 for i in range(len(safe) - 2) if sum(safe[i : i + 3]) >= 2.7), 999)


@pytest.mark.long
def test_with_a_short_trace_credit_reaches_safety_in_seven_tenths_of_the_steps(options, tmp_path):
    """Median of five seeds. Over the whole response (a trace of 1, or groups) the gain is smaller: docs/method.md."""
    more = [*options, "--scoring.cost=tests.support.scorers:please", "--scoring.reward=tests.support.scorers:nothing"]
    more += ["--rollout.prompts_per_step=4", "--rollout.samples_per_prompt=8", "--rollout.max_response_tokens=64"]
    more += ["--algorithm.advantages=gae", "--critic.gae_lambda=0.8", "--critic.lr=1e-3", "--optimizer.lr=3e-3"]
    more += ["--penalty.lr=0", "--algorithm.beta=0", "--save_every=0", "--steps=60"]
    ratios = []
    for seed in range(5):
        folders = [tmp_path / f"{credit}-{seed}" for credit in ("redistributed", "terminal")]
        for folder in folders:
            credit = f"--algorithm.credit={folder.name.split('-')[0]}"
            train.run_command([*more, credit, f"--seed={seed}", f"--out={folder}"])
        ours, theirs = map(steps_to_safety, folders)
        ratios.append(ours / theirs)
    assert sorted(ratios)[2] <= 0.7, ratios


CREDIT = [  # learns within a few steps where Please costs
    "--algorithm.credit=redistributed",
    "--scoring.cost=tests.support.scorers:please",
    "--rollout.samples_per_prompt=32",
    "--rollout.max_response_tokens=24",
]


@pytest.mark.parametrize("form", ["group", "gae"])
def test_a_run_with_credit_records_it_and_resumes_as_if_it_had_not_stopped(form, options, tmp_path):
    more = [*options, *CREDIT, f"--algorithm.advantages={form}"]
    train.run_command([*more, "--steps=8", f"--out={tmp_path / 'whole'}"])
    train.run_command([*more, "--steps=5", f"--out={tmp_path / 'part'}"])
    train.run_command(["--resume", str(tmp_path / "part"), "--steps=8"])
    records, samples = (
        [(tmp_path / run / f"{name}.jsonl").read_text() for run in ("whole", "part")] for name in ("metrics", "samples")
    )
    explained = [[json.loads(line)["credit_explained_variance"] for line in text.splitlines()] for text in records]
    assert explained[0] == explained[1]
    assert any(explained[0][5:])  # what was learned before the stop is of use after it
    assert samples[0] == samples[1]
    assert any(json.loads(line)["costliest"] for line in samples[0].splitlines())
    whole, part = ((tmp_path / run / "final" / "model.safetensors").read_bytes() for run in ("whole", "part"))
    assert whole == part
