"""Decoding with a growing cache: rows that leave, prepared weights, and the line that says how a model decodes."""

import dataclasses

import pytest
import torch

from repo.config.schema import RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.models.policy import load_policy
from repo.rollout import decoding
from repo.rollout.decoding import describe_decoding
from repo.rollout.fused_decoder import FusedDecoder
from repo.rollout.kv_cache import GrowingDecoder
from repo.rollout.sample import sample
from repo_kernels.backends.cpu import extension
from repo_kernels.layers.packed_linear import packed_linears
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")
needs_extension = pytest.mark.skipif(not extension.available(), reason="the C++ backend was not built")
FUSED = pytest.param(FusedDecoder, marks=needs_extension)
SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def policy(tiny_model):
    return load_policy(str(tiny_model), CPU, trainable=True)


@pytest.fixture(scope="module")
def prompts(policy):
    return tokenize_prompts([Prompt(str(i), q, "") for i, q in enumerate(QUESTIONS)], policy.tokenizer, None, 200).kept


@pytest.mark.parametrize("decoder", [GrowingDecoder, FUSED])
def test_finished_rows_leave_the_batch_without_changing_the_others(decoder, policy, prompts, monkeypatch):
    if decoder is GrowingDecoder:
        monkeypatch.setattr(decoding, "why_unfused", lambda policy: "not wanted")
    policy = dataclasses.replace(policy, eos_ids=tuple(range(1, 30)))
    config, sizes = RolloutConfig(max_response_tokens=60), []
    describe_decoding(policy)  # whose trials are not counted
    step = decoder.step
    monkeypatch.setattr(decoder, "step", lambda self, tokens: (sizes.append(len(tokens)), step(self, tokens))[1])
    shrinking = sample(policy, prompts, 4, config, seed=0, step=0)
    assert sizes[0] == 24 > 2 * sizes[-1] > 0
    monkeypatch.setattr(decoder, "keep", lambda self, rows: False)
    assert sample(policy, prompts, 4, config, seed=0, step=0).texts == shrinking.texts


def test_weights_cast_once_compute_what_autocast_computes(policy):
    layer, x = policy.model.model.layers[0].mlp.up_proj, torch.randn(3, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        with packed_linears(policy.model, 3):
            assert "forward" in layer.__dict__
            assert torch.equal(layer(x), expected)
    assert "forward" not in layer.__dict__


def test_the_choice_is_one_line_and_says_why_no_faster_way_is_taken(policy, monkeypatch):
    chosen = "one C++ call per token" if extension.available() else "token by token, growing KV cache"
    assert describe_decoding(policy).startswith(f"decoding: {chosen}")
    monkeypatch.setattr(decoding, "why_unfused", lambda policy: "its MLP has biases")
    assert describe_decoding(policy) == "decoding: token by token, growing KV cache (its MLP has biases)"
