"""The gradient of the expected cost, and the patch of weights that it chooses."""

import math

import pytest
import torch
from torch import nn

from repo.common.errors import UserError
from repo.config.schema import Config, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.actor import Actor
from repo.models.policy import load_policy
from repo.models.scaled import patch, require_share, scale_update, trained_copies
from repo.rollout.sample import sample
from repo.training.cost_gradient import cost_gradient
from tests.support.scorers import words
from tests.support.tiny import QUESTIONS


def test_the_gradient_is_that_of_written_out_log_probs_weighted_by_the_centred_cost(tiny_model):
    policy = load_policy(str(tiny_model), torch.device("cpu"), trainable=True)
    prompts = tokenize_prompts([Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS[:3])], policy.tokenizer, None, 99)
    config = Config(rollout=RolloutConfig(max_response_tokens=7, temperature=0.8))
    rollout = sample(policy, prompts.kept, 3, config.rollout, 0, "patch")
    costs = torch.tensor(words(None, rollout.texts), dtype=torch.float32) + torch.tensor([0.0, 1.0, -0.5] * 3)
    policy.model.lm_head.weight.grad = torch.ones_like(policy.model.lm_head.weight)  # of an earlier pass
    found = cost_gradient(Actor(policy), config, rollout, costs)
    assert all(p.grad is None for p in policy.model.parameters())

    total = torch.zeros((), dtype=torch.float64)
    for row, (prompt, response) in enumerate(rollout.sequences.token_lists()):
        logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1].double() / 0.8
        logp = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum()
        others = [float(costs[i]) for i in range(9) if i // 3 == row // 3 and i != row]
        total = total + (float(costs[row]) - sum(others) / 2) * logp / 9
    total.backward()
    for name, parameter in policy.model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert scale > 0
        assert torch.allclose(found[name], parameter.grad, atol=2e-3 * scale, rtol=0), name


def two_layers(*values):
    """A module of two parameters of two entries."""
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.tensor(v)) for v in values)
    return model


@pytest.mark.parametrize(
    ("keep", "a", "b"),
    [
        (0.25, [0.0, 2.0], [1.0, 1.0]),  # importances 1, 8 and 6, 0
        (0.5, [0.0, 2.0], [4.0, 1.0]),
        (0.75, [0.5, 2.0], [4.0, 1.0]),
        (1.0, [0.5, 2.0], [4.0, 1.0]),  # the entry without a gradient never moves
        (0.01, [0.0, 2.0], [1.0, 1.0]),  # at least one entry
    ],
)
def test_the_entries_with_the_largest_products_are_added(keep, a, b):
    model = two_layers([0.0, 0.0], [1.0, 1.0])
    trained = {"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([7.0, -9.0])}
    gradient = {"a": torch.tensor([1.0, -2.0]), "b": torch.tensor([1.0, 0.0])}
    added = patch(model, trained, gradient, 0.5, keep)
    assert model.a.tolist() == a
    assert model.b.tolist() == b
    assert added == sum(x != y for x, y in zip(a + b, [0.0, 0.0, 1.0, 1.0], strict=True)) / 4


def test_an_update_is_scaled_from_where_it_began():
    model = two_layers([1.0, -1.0], [0.0, 2.0])
    begun = trained_copies(model)
    with torch.no_grad():
        model.a.copy_(torch.tensor([2.0, 1.0]))
        model.b.copy_(torch.tensor([0.0, 2.5]))
    scale_update(model, begun, 1.5)
    assert model.a.tolist() == [2.5, 2.0]
    assert model.b.tolist() == [0.0, 2.75]


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_a_share_out_of_range_is_refused(keep):
    with pytest.raises(UserError, match=r"--keep must be > 0 and <= 1; got"):
        require_share(keep, "--keep")
