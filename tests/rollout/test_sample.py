"""Sampling: exact, reproducible, the same whatever the batch."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from repo.common.errors import UserError
from repo.config.schema import RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.actor import Actor
from repo.models.policy import choose_device, load_policy
from repo.rollout.gather import merge
from repo.rollout.sample import draw_uniforms, sample, sample_tokens
from repo_kernels.layers.packed_linear import packed_linears
from tests.support import padded_forward
from tests.support.predictions import response_logps
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(str(tiny_model), CPU, trainable=False)


@pytest.fixture(scope="module")
def prompts(policy):
    return tokenize_prompts([Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)], policy.tokenizer, None, 200).kept


def alone(policy, prompt, response):
    """Log-probabilities of one response, from its own unpadded forward."""
    logits = policy.model(input_ids=torch.tensor([[*prompt.token_ids, *response]])).logits[0]
    logps = torch.log_softmax(logits[len(prompt.token_ids) - 1 : -1], -1)
    return logps.gather(1, torch.tensor(response, dtype=torch.int64)[:, None])[:, 0]


@torch.no_grad()
def test_batches_give_the_log_probs_of_single_unpadded_sequences(policy, prompts):
    responses = [[9, 8, 7], [30], [], [11, 12, 13, 14, 15], [40, 41], [50]]
    s = make_sequences([p.token_ids for p in prompts], responses, policy.pad_id)
    batched = response_logps(policy, s, 1.0, 10**6)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        assert torch.allclose(batched[i, : len(response)], alone(policy, prompt, response), atol=1e-5)


def test_a_sample_depends_on_its_seed_only_and_not_on_the_batch(policy, prompts):
    config = RolloutConfig(max_response_tokens=12)
    together = sample(policy, prompts, 2, config, seed=5, step=3)
    alone = sample(policy, prompts[2:3], 2, RolloutConfig(max_response_tokens=12, batch_size=1), seed=5, step=3)
    assert together.texts[4:6] == alone.texts
    assert sample(policy, prompts, 2, config, seed=5, step=4).texts != together.texts
    assert sample(policy, prompts, 2, config, seed=6, step=3).texts != together.texts


def test_decoding_with_a_cache_equals_sampling_from_full_forwards(policy, prompts):
    config = RolloutConfig(max_response_tokens=10)
    rollout = sample(policy, prompts[:2], 2, config, seed=1, step=0)
    uniforms = draw_uniforms(prompts[:2], 2, 10, 1, 0)
    for row in range(4):
        ids = list(rollout.prompts[row].token_ids)
        expected = []
        for t in range(10):
            logits = policy.model(input_ids=torch.tensor([ids])).logits[:, -1]
            token = int(sample_tokens(logits, uniforms[row, t : t + 1], 1.0, 1.0)[0])
            expected.append(token)
            ids.append(token)
            if token in policy.eos_ids:
                break
        got = rollout.sequences.response_ids[row][rollout.sequences.response_mask[row]]
        assert got.tolist() == expected


def test_a_rollout_knows_the_log_probs_it_sampled_with(policy, prompts):
    rollout = sample(
        policy, prompts, 2, RolloutConfig(max_response_tokens=9, temperature=0.7, batch_size=4), seed=2, step=0
    )
    expected = response_logps(policy, rollout.sequences, 0.7, 10**6)
    assert rollout.logps.shape == expected.shape
    assert torch.allclose(rollout.logps, expected, atol=1e-5)


def test_parts_of_a_batch_are_sampled_as_the_whole(policy, prompts):
    repeated = [*prompts, prompts[0]]  # the prompt that comes again draws on, whoever samples it
    config = RolloutConfig(max_response_tokens=12)
    whole = sample(policy, repeated, 2, config, 5, 3)
    parts = [sample(policy, repeated, 2, config, 5, 3, part) for part in (range(3), range(3, 4), range(4, 7))]
    joined = merge(parts, policy.pad_id)
    assert joined.texts == whole.texts
    assert joined.prompts == whole.prompts
    assert torch.equal(joined.group, whole.group)
    assert torch.equal(joined.sequences.input_ids, whole.sequences.input_ids)
    assert torch.allclose(joined.logps, whole.logps, atol=1e-5)


def test_responses_end_with_their_first_stop_token(policy, prompts):
    rollout = sample(policy, prompts, 4, RolloutConfig(max_response_tokens=60), seed=0, step=0)
    s = rollout.sequences
    ended = 0
    for row in range(len(s.input_ids)):
        tokens = s.response_ids[row][s.response_mask[row]].tolist()
        inside = [t for t in tokens[:-1] if t in policy.eos_ids]
        assert not inside
        assert tokens[-1] in policy.eos_ids or len(tokens) == 60
        ended += tokens[-1] in policy.eos_ids
    assert ended > 0


def test_inverse_cdf_sampling_has_the_right_frequencies():
    torch.manual_seed(0)
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
    uniforms = (torch.arange(20000) + 0.5) / 20000
    tokens, logps = sample_tokens(logits.expand(20000, -1), uniforms, temperature=2.0, top_p=1.0)
    frequencies = torch.bincount(tokens, minlength=4) / 20000
    assert torch.allclose(frequencies, torch.softmax(logits[0] / 2, -1), atol=1e-4)
    assert frequencies[2] == 0
    assert torch.allclose(logps, torch.log_softmax(logits[0] / 2, -1)[tokens], atol=1e-6)


def test_inverse_cdf_never_picks_an_impossible_token_at_the_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert sample_tokens(logits, torch.tensor([0.0]), 1.0, 1.0)[0].item() == 1
    assert sample_tokens(logits, torch.tensor([1 - 1e-12], dtype=torch.float64), 1.0, 1.0)[0].item() == 2


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    uniforms = torch.linspace(0, 0.9999, 1000)
    tokens, logps = sample_tokens(logits.expand(1000, -1), uniforms, 1.0, 0.79)
    assert tokens.unique().tolist() == [0, 1]
    assert torch.allclose(logps.exp(), torch.tensor([0.5, 0.3])[tokens] / 0.8)  # of the truncated distribution


def test_packed_linears_compute_the_same_and_leave_no_trace(policy):
    layer = policy.model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    plain = layer(x)
    with packed_linears(policy.model, 3):
        assert "forward" in layer.__dict__
        assert torch.allclose(layer(x), plain, atol=1e-5)
    assert "forward" not in layer.__dict__
    assert torch.equal(layer(x), plain)


def test_log_probs_are_those_of_the_full_softmax(policy, prompts):
    rollout = sample(policy, prompts, 1, RolloutConfig(max_response_tokens=9), seed=2, step=0)
    s = rollout.sequences
    got = response_logps(policy, s, temperature=0.7, budget=40)
    full = padded_forward.response_logps(policy, s, temperature=0.7)
    assert (got[s.response_mask] - full[s.response_mask]).abs().max() < 1e-5
    assert (got[~s.response_mask] == 0).all()


def test_the_temperature_is_the_one_sampled_at(policy, prompts):
    cold = sample(policy, prompts[:1], 16, RolloutConfig(max_response_tokens=1, temperature=1e-4), seed=0, step=0)
    greedy = policy.model(input_ids=torch.tensor([prompts[0].token_ids])).logits[0, -1].argmax()
    assert (cold.sequences.response_ids[:, 0] == greedy).all()


def test_a_model_that_is_not_there_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="model.path: no such folder"):
        load_policy(str(tmp_path / "nothing"), CPU, trainable=False)


def test_an_impossible_device_is_a_sentence():
    with pytest.raises(UserError, match="model.device: 'warp' cannot be used here"):
        choose_device("warp")


def test_all_stop_tokens_count(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.generation_config.eos_token_id = [7, 8]
    model.save_pretrained(tmp_path)
    load_policy(str(tiny_model), CPU, trainable=False).tokenizer.save_pretrained(tmp_path)
    assert load_policy(str(tmp_path), CPU, trainable=False).eos_ids == (7, 8, 1)


@torch.no_grad()
def test_a_shared_prefix_gives_the_log_probs_of_separate_sequences(policy, prompts):
    responses = [[9, 8, 7, 1], [30, 31], [], [11, 12, 13, 14, 15], [40], [50, 51, 52]]
    chosen = [prompts[0], prompts[0], prompts[0], prompts[4], prompts[2], prompts[2]]
    group = torch.tensor([7, 7, 7, 3, 5, 5])
    s = make_sequences([p.token_ids for p in chosen], responses, policy.pad_id, group)
    shared = response_logps(policy, s, 1.0, 10**6)
    for i, (prompt, response) in enumerate(zip(chosen, responses, strict=True)):
        assert torch.allclose(shared[i, : len(response)], alone(policy, prompt, response), atol=1e-5)


def test_padded_batches_give_the_log_probs_of_packed_ones(policy, prompts):
    rollout = sample(policy, prompts, 3, RolloutConfig(max_response_tokens=9), seed=2, step=0)
    attention = dataclasses.replace(policy.attention, packs=False)
    padded = response_logps(dataclasses.replace(policy, attention=attention), rollout.sequences, 1.0, 300)
    assert (response_logps(policy, rollout.sequences, 1.0, 300) - padded).abs().max() < 1e-5


def test_the_gradient_through_a_shared_prefix_is_the_same_every_time(policy, prompts):
    model = LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=256, intermediate_size=64, num_hidden_layers=1))
    actor = Actor(dataclasses.replace(policy, model=model.eval()))
    s = make_sequences([prompts[0].token_ids] * 6, [[5] * 40] * 6, 0, torch.tensor([0, 0, 0, 1, 1, 1]))
    (packed,) = actor.parts(s, torch.arange(6), 10**6)
    gradients = []
    for _ in range(10):
        model.zero_grad()
        actor(packed, lambda states, _: states.logps(1.0)).square().sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_models_that_cannot_be_packed_are_padded_instead(tmp_path, policy):
    config = FalconConfig(vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    FalconForCausalLM(config).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    falcon = load_policy(str(tmp_path), CPU, trainable=False)
    assert not falcon.attention.packs
    s = make_sequences([[4, 5], [7]], [[6, 7], [8]], 0)
    assert torch.allclose(response_logps(falcon, s, 1.0, 99), padded_forward.response_logps(falcon, s), atol=1e-5)


def test_a_prompt_that_comes_twice_in_a_step_gets_other_samples(policy, prompts):
    rollout = sample(policy, [prompts[0], prompts[0]], 3, RolloutConfig(max_response_tokens=12), seed=0, step=0)
    assert len(set(rollout.texts)) == 6
    assert (
        rollout.texts[:3] == sample(policy, prompts[:1], 3, RolloutConfig(max_response_tokens=12), seed=0, step=0).texts
    )
