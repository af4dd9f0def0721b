"""Learned credit in training: advantages of tokens, and runs."""

import dataclasses
import io
import itertools
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from repo import train
from repo.common.errors import UserError
from repo.config.parse import make_parser, parse_config
from repo.config.schema import AlgorithmConfig, Config, CriticConfig
from repo.models.credit import TokenStates
from repo.runs.console import show_samples
from repo.runs.records import credit_record
from repo.training.advantages import method_advantages, penalised_cost
from repo.training.update import Updater
from repo_kernels.advantages import cost_to_go, gae, group_advantages, token_signal

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


def test_a_batch_does_not_see_what_it_teaches():
    """Shares that knew the cost would bias the gradient."""
    calls = []

    class Watched:
        def shares(self, *given):
            calls.append(("shares", given))
            return torch.full((6, 4), 0.5)

        def fit(self, *given):
            calls.append(("fit", given))

    updater = object.__new__(Updater)
    updater.credit, updater.config = Watched(), Config(algorithm=REDISTRIBUTED)
    sequences, reading, costs = SimpleNamespace(response_mask=MASK), object(), torch.tensor([2.0, -1, 0, 3, 0.5, 1])
    found = updater.share_and_learn(reading, range(6), sequences, costs, 0.5)
    assert torch.equal(found, torch.full((6, 4), 0.5))
    assert [name for name, _ in calls] == ["shares", "fit"]
    assert calls[0][1] == (TokenStates(reading, range(6), MASK),)
    assert torch.equal(calls[1][1][1], torch.tensor([1.5, 0, 0, 2.5, 0, 0.5]))  # {C - d}^+ of the step's limit
    updater.credit = None
    assert updater.share_and_learn(None, range(6), sequences, costs, 0.5) is None


def test_the_explained_variance_is_that_of_the_penalised_cost_at_the_limit_of_the_step():
    costs, lengths = torch.tensor([2.0, -4, 0.5, 3]), torch.tensor([2, 2, 0, 1])
    shares = torch.tensor([[0.5, 0.5], [0.0, 0.1], [0.0, 0.0], [1.7, 0.0]])
    batch = SimpleNamespace(
        shares=shares, costs=costs, cost_limit=1.0, sequences=SimpleNamespace(response_lengths=lengths)
    )
    penalised, explained = np.array([1.0, 0.0, 2.0]), np.array([1.0, 0.1, 1.7])  # the masked response is left out
    expected = 1 - np.var(penalised - explained) / np.var(penalised)
    assert credit_record(REDISTRIBUTED, batch)["credit_explained_variance"] == pytest.approx(expected, rel=1e-6)
    assert credit_record(REDISTRIBUTED, SimpleNamespace(shares=None)) == {}


def test_a_run_may_change_to_learned_credit(options, tmp_path):
    train.run_command([*options, "--steps=2", f"--out={tmp_path / 'run'}"])
    change = ["--algorithm.credit=redistributed", "--allow-change", "algorithm.credit"]
    train.run_command(["--resume", str(tmp_path / "run"), "--steps=4", *change])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert ["credit_explained_variance" in line for line in lines] == [False, False, True, True]


def test_the_console_names_the_tokens_that_cost(capsys):
    sample = {"safe": False, "reward": 0.5, "cost": 2.0, "advantage": -1.0, "prompt": "p", "response": "r"}
    console = Console(file=io.StringIO(), width=100)
    show_samples(console, [sample | {"costliest": [[" bomb", 1.25], ["[", 0.5]]}, sample | {"costliest": []}, sample])
    assert console.file.getvalue().count("cost by token: ' bomb' 1.25, '[' 0.50\n") == 1
    assert console.file.getvalue().count("cost by token") == 1


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
