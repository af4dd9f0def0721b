"""The embedded model on real prompts: packed, padded and single sequences have the same loss and gradient."""

import dataclasses

import pytest
import torch

from repo.assets import ensure
from repo.config.schema import Config, ModelConfig, OptimizerConfig
from repo.data.prompts import load_prompts, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.actor import Actor
from repo.models.layout import Attention
from repo.models.matmul import Matmul
from repo.models.policy import load_policy
from repo.training.accumulation import Accumulator
from repo.training.advantages import Advantages
from repo.training.batch import Batch
from tests.support.padded_forward import response_logps

pytestmark = pytest.mark.assets

ANSWERS = ("I am sorry, but I cannot help you with that.", "Bread is made of flour.", "Yes.", "Rivers flow to the sea.")
LAM, BETA = 0.7, 0.02


@pytest.fixture(scope="module")
def setting():
    """(policy, batch): two prompts with two responses of different lengths each, off the reference."""
    folder = ensure()
    config = ModelConfig(matmul_dtype="float32")
    policy = load_policy(str(folder / "policy"), torch.device("cpu"), trainable=True, config=config)
    prompts = tokenize_prompts(load_prompts(folder / "prompts" / "train.jsonl")[:2], policy.tokenizer, None, 256).kept
    rows = [prompts[0], prompts[0], prompts[1], prompts[1]]
    answers = [policy.tokenizer(a).input_ids for a in ANSWERS]
    group = torch.tensor([0, 0, 1, 1])
    sequences = make_sequences([p.token_ids for p in rows], answers, policy.pad_id, group)
    reward, cost, costs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        shift = 0.1 * torch.randn(sequences.response_ids.shape, generator=torch.Generator().manual_seed(1))
        reference = response_logps(policy, sequences) + shift
    advantages = Advantages(reward, cost, reward - LAM * cost)
    return policy, Batch(sequences, advantages, costs, reference, LAM, BETA)


def gradient(policy) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return found


@pytest.fixture(scope="module")
def expected(setting):
    """(loss, gradient) in fp64 by autograd through one sequence at a time, with the model's own head."""
    policy, batch = setting
    policy.model.double()
    total, tokens = 0.0, int(batch.sequences.response_lengths.sum())
    for row in range(4):
        alone = batch.sequences.select(torch.tensor([row]))
        assert alone.attention_mask.all()
        logps = response_logps(policy, alone)[0]
        delta = logps - batch.ref_logps[row, : len(logps)]
        ratio = (logps - logps.detach()).exp()
        loss = -ratio * batch.advantages.combined[row] + BETA * ratio * ((-delta).exp() + delta - 1)
        (loss.sum() / tokens).backward()
        total += loss.sum().item() / tokens
    return total, gradient(policy)


@pytest.mark.parametrize(
    ("dtype", "layout", "budget", "tolerance"),
    [
        (torch.float64, "packed", 10**6, 1e-6),
        (torch.float64, "packed", 60, 1e-6),
        (torch.float64, "padded", 10**6, 1e-6),
        # norms compute in fp32 in any case; a single sequence in fp32 is 1.6e-5 away itself, since a few of this
        # model's states are very large
        (torch.float32, "packed", 10**6, 3e-5),
    ],
)
def test_loss_and_gradient_are_those_of_single_sequences(setting, expected, dtype, layout, budget, tolerance):
    policy, batch = setting
    policy.model.to(dtype)
    assert policy.attention.packs
    if layout == "padded":
        policy = dataclasses.replace(policy, attention=Attention(False, "padded", "to compare"))
    config = Config(optimizer=OptimizerConfig(micro_batch_tokens=budget))
    actor = Actor(policy)
    rows = [packed.input_ids.shape[0] for packed in actor.parts(batch.sequences, torch.arange(4), budget)]
    assert rows == ([4] if layout == "padded" else [1] * (1 if budget > 60 else 3))
    losses, _ = Accumulator(actor, config).backward(batch, torch.arange(4))
    loss, whole = expected
    assert losses["loss"] == pytest.approx(loss, rel=1e-6)
    assert (gradient(policy) - whole).norm() <= tolerance * whole.norm()


def test_products_in_bfloat16_change_loss_and_gradient_by_no_more_than_their_rounding(setting, expected):
    """Each product has three roundings of 2^-9; 30 layers of them add up to some percent of the gradient.

    How many depends on how a few very large states round, and so on the order of the sums: 3.2 and 3.5 % where fp64 and
    fp32 products are rounded by hand, 6.8 % on a processor with AVX2, whose products are each exact to their rounding.
    """
    policy, batch = setting
    policy.model.float()
    half = dataclasses.replace(policy, matmul=Matmul(half=True))
    losses, _ = Accumulator(Actor(half), Config()).backward(batch, torch.arange(4))
    loss, whole = expected
    error = (gradient(policy) - whole).norm()
    assert losses["loss"] == pytest.approx(loss, rel=1e-3)
    assert 1e-3 * whole.norm() < error < 0.1 * whole.norm()
