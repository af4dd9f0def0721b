"""Decoding in fixed buffers: the logits of a growing cache, whatever the batch, and the models that it refuses."""

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from repo.config.schema import ModelConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.policy import load_policy
from repo.rollout import decoding, kv_cache
from repo.rollout import sample as sampling
from repo.rollout.decoding import decodes_in_buffers, describe_decoding
from repo.rollout.kv_cache import GrowingDecoder, StaticDecoder
from repo.rollout.sample import sample
from repo_kernels.layers.packed_linear import packed_linears
from tests.support.tiny import QUESTIONS, make_tokenizer, save_tiny_model

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
    "qwen3": Qwen3Config(**SMALL, head_dim=8),
}
REFUSED = {
    "not every layer has full attention": Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8),
    "the model does not take a 4-D mask": FalconConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True, initializer_range=0.2
    ),
    "its rotary embedding looks at the length": LlamaConfig(
        **SMALL, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
}


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(str(tiny_model), CPU, trainable=True)


@pytest.fixture(scope="module")
def prompts(policy):
    return tokenize_prompts([Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)], policy.tokenizer, None, 200).kept


def with_model(policy, config, device=CPU):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    return dataclasses.replace(policy, model=model, device=device)


def in_buffers(policy, rows, width, limit):
    return StaticDecoder(policy.model, rows, width + limit, captures=False)


def largest_difference(policy, one, other, batches, samples=3, steps=6):
    """Between the logits of two decoders fed the same random tokens, relative to the largest logit."""
    worst = 0.0
    with torch.no_grad(), policy.running():
        for ids in batches:
            prefix = make_sequences(ids, [[]] * len(ids), policy.pad_id).to(policy.device)
            a, b = (decoder.start(prefix, samples) for decoder in (one, other))
            assert a.shape == b.shape == (len(ids) * samples, a.shape[1])
            for step in range(steps):
                worst = max(worst, ((a - b).abs().max() / a.abs().max()).item())
                tokens = torch.randint(0, 380, (len(a),), generator=torch.Generator().manual_seed(step))
                a, b = (decoder.step(tokens.to(policy.device)) for decoder in (one, other))
    return worst


BATCHES = [[[5, 6, 7, 8, 9, 10, 11], [12, 13]], [[20, 21, 22]], [[30, 31, 32, 33, 34], [40, 41, 42]]]


@pytest.mark.parametrize("name", ["llama", *CONFIGS])
def test_buffers_give_the_logits_of_a_growing_cache_batch_after_batch(name, policy):
    policy = policy if name == "llama" else with_model(policy, CONFIGS[name])
    growing, static = GrowingDecoder(policy.model, 6), in_buffers(policy, 6, 7, 6)
    assert decodes_in_buffers(policy)
    assert largest_difference(policy, growing, static, BATCHES) < 1e-5


def test_a_full_batch_leaves_nothing_behind_for_a_smaller_one(policy):
    used, fresh = in_buffers(policy, 6, 7, 6), in_buffers(policy, 6, 7, 6)
    with torch.no_grad():
        used.start(make_sequences(BATCHES[0], [[], []], 0), 3)
        for _ in range(5):
            used.step(torch.arange(6))
    assert largest_difference(policy, used, fresh, BATCHES[1:]) == 0


class WarmedUpDecoder(StaticDecoder):
    """Takes the steps that come before a capture and goes on without a graph."""

    def _capture(self):
        self._warm_up()
        self.captures = False


@pytest.mark.parametrize("limit", [2, 3])
def test_warm_up_steps_leave_no_trace_in_buffers_that_the_batch_fills(limit, policy):
    width = kv_cache.COLUMNS - limit
    growing, warmed = GrowingDecoder(policy.model, limit), WarmedUpDecoder(policy.model, 6, width + limit, True)
    longest = [list(range(5, 5 + width)), [20, 21, 22]]
    assert largest_difference(policy, growing, warmed, [longest, BATCHES[1]], steps=limit) < 1e-5
    assert warmed.length == width + limit
    assert not warmed.captures


@pytest.mark.parametrize("batch_size", [4, 64])
def test_responses_from_buffers_are_those_of_a_growing_cache(policy, prompts, monkeypatch, batch_size):
    config = RolloutConfig(max_response_tokens=40, batch_size=batch_size)
    expected = sample(policy, prompts, 4, config, seed=0, step=0)
    ended = expected.sequences.response_lengths < 40
    assert 0 < ended.sum() < len(ended)
    monkeypatch.setattr(sampling, "make_decoder", in_buffers)
    assert sample(policy, prompts, 4, config, seed=0, step=0).texts == expected.texts


def test_finished_rows_leave_the_batch_without_changing_the_others(policy, prompts, monkeypatch):
    policy = dataclasses.replace(policy, eos_ids=tuple(range(1, 30)))
    config, sizes = RolloutConfig(max_response_tokens=60), []
    step = GrowingDecoder.step
    monkeypatch.setattr(GrowingDecoder, "step", lambda self, tokens: (sizes.append(len(tokens)), step(self, tokens))[1])
    shrinking = sample(policy, prompts, 4, config, seed=0, step=0)
    assert sizes[0] == 24 > 2 * sizes[-1] > 0
    monkeypatch.setattr(GrowingDecoder, "keep", lambda self, rows: False)
    assert sample(policy, prompts, 4, config, seed=0, step=0).texts == shrinking.texts


def test_keys_and_values_follow_autocast(tmp_path, prompts):
    folder = save_tiny_model(tmp_path / "model")
    half = load_policy(str(folder), CPU, trainable=True, config=ModelConfig(dtype="bfloat16"))
    assert half.autocast == torch.bfloat16
    with half.running():
        growing, static = GrowingDecoder(half.model, 6), in_buffers(half, 6, 7, 6)
    assert largest_difference(half, growing, static, BATCHES) < 0.05
    assert static.cache.layers[0].keys.dtype == torch.bfloat16


def test_weights_cast_once_compute_what_autocast_computes(policy):
    layer, x = policy.model.model.layers[0].mlp.up_proj, torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with packed_linears(policy.model, 3):
            assert "forward" in layer.__dict__
            assert torch.equal(layer(x), expected)
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("why", REFUSED)
def test_models_that_need_a_growing_cache_are_told_apart(why, policy):
    assert decoding._why_growing(with_model(policy, REFUSED[why])) == why


def test_the_choice_is_one_line(policy):
    assert describe_decoding(policy) == "decoding: token by token, growing KV cache"


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_captured_step_gives_the_logits_of_an_eager_one(dtype, tmp_path):
    device = torch.device("cuda")
    policy = load_policy(str(save_tiny_model(tmp_path / "model")), device, True, ModelConfig(dtype=dtype))
    assert describe_decoding(policy) == "decoding: CUDA graph over a static KV cache"
    with torch.no_grad(), policy.running(), packed_linears(policy.model, 6):
        captured, eager = (StaticDecoder(policy.model, 6, 13, captures) for captures in (True, False))
        assert largest_difference(policy, captured, eager, BATCHES) < 1e-5
        assert captured.graph is not None


@GPU
@pytest.mark.gpu
def test_rollouts_on_a_gpu_are_those_of_the_growing_cache(tmp_path, monkeypatch):
    folder = save_tiny_model(tmp_path / "model")
    policy = load_policy(str(folder), torch.device("cuda"), trainable=True)
    questions = [Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)]
    kept = tokenize_prompts(questions, make_tokenizer(), None, 200).kept
    config = RolloutConfig(max_response_tokens=40, batch_size=8)
    captured = sample(policy, kept, 4, config, seed=0, step=0)
    monkeypatch.setattr(
        sampling, "make_decoder", lambda policy, rows, width, limit: GrowingDecoder(policy.model, limit)
    )
    assert sample(policy, kept, 4, config, seed=0, step=0).texts == captured.texts
