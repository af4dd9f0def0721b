"""The head of learned credit: what one fit is, what it finds, and what it must not trust."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BartConfig, BartForCausalLM

from repo.common.errors import UserError
from repo.config.schema import AlgorithmConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models import credit as module
from repo.models.actor import Actor, read_reference
from repo.models.credit import Credit, TokenStates, costliest, make_credit
from repo.models.policy import load_policy
from repo.rollout.sample import sample
from repo.scoring.embedded import Reading
from tests.support.tiny import QUESTIONS, make_tokenizer

REDISTRIBUTED = AlgorithmConfig(credit="redistributed")


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
        learner.fit(TokenStates(reading_of(states), range(5), mask), costs)
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
        learner.fit(TokenStates(reading_of(states), range(2), mask), costs)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())
    assert not learner.shares(TokenStates(reading_of(states), range(2), mask)).any()


def test_responses_outside_the_mask_teach_nothing():
    states, lengths = random_states([3, 4, 2]), torch.tensor([3, 0, 2])
    mask = torch.arange(4) < lengths[:, None]
    found, expected = head(), head()
    found.fit(TokenStates(reading_of(states), range(3), mask), torch.tensor([0.0, 9.0, 1.0]))
    kept = {layer: [rows[0], rows[2]] for layer, rows in states.items()}
    expected.fit(TokenStates(reading_of(kept), range(2), mask[[0, 2]]), torch.tensor([0.0, 1.0]))
    for name, tensor in found.tensors().items():
        assert torch.allclose(tensor, expected.tensors()[name], rtol=1e-12, atol=1e-12), name


def test_a_batch_in_which_nothing_counts_changes_nothing():
    states, mask = random_states([3, 3]), torch.ones(2, 3, dtype=torch.bool)
    learner = head()
    learner.fit(TokenStates(reading_of(states), range(2), mask), torch.tensor([0.0, 1.0]))
    before = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    learner.fit(TokenStates(reading_of(states), range(2), torch.zeros_like(mask)), torch.tensor([0.0, 1.0]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.tensors().items())
    assert not learner.shares(TokenStates(reading_of(states), range(2), torch.zeros_like(mask))).any()


def test_a_head_that_does_not_predict_is_not_trusted():
    learner, generator = head(), torch.Generator().manual_seed(5)
    mask = torch.ones(8, 4, dtype=torch.bool)
    for step in range(30):
        reading = reading_of(random_states([4] * 8, step))
        shares = learner.shares(TokenStates(reading, range(8), mask))
        unrelated = torch.rand(8, generator=generator)  # nothing to do with the states
        learner.fit(TokenStates(reading, range(8), mask), unrelated)
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
        shares = learner.shares(TokenStates(reading, range(64), mask))
        learner.fit(TokenStates(reading, range(64), mask), costs)
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
        shares = learner.shares(TokenStates(reading, range(64), mask))
        learner.fit(TokenStates(reading, range(64), mask), costs)
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


def test_a_later_process_reads_its_own_rows_of_the_mask():
    states = random_states([2, 2])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [0, 0]], dtype=torch.bool)
    ((own, found),) = TokenStates(reading_of(states), range(2, 4), mask).each((0, 1))
    assert own == 0
    assert torch.equal(found, torch.cat((states[0][0][:1], states[1][0][:1]), 1))
