"""Causal LMs of other families, tiny and random, saved to disk: exact log-probs and a training step."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from repo import train
from repo.config.schema import ModelConfig, RolloutConfig
from repo.data.prompts import Prompt, tokenize_prompts
from repo.data.sequences import make_sequences
from repo.models.policy import load_policy
from repo.rollout.sample import draw_uniforms, sample, sample_tokens
from tests.support.predictions import response_logps
from tests.support.tiny import QUESTIONS, make_tokenizer

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
WINDOW = 8  # shorter than the prompts, so that a window that is ignored shows
CONFIGS = {
    "gpt2": lambda ids: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, **ids),
    "mistral": lambda ids: MistralConfig(**SMALL, sliding_window=None, **ids),
    "mistral-window": lambda ids: MistralConfig(**SMALL, sliding_window=WINDOW, **ids),
    "qwen2": lambda ids: Qwen2Config(**SMALL, **ids),
    "qwen3": lambda ids: Qwen3Config(**SMALL, head_dim=8, **ids),
    "gemma2": lambda ids: Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, final_logit_softcapping=3.0, **ids),
    "gemma3": lambda ids: Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=WINDOW, **ids),
}


@pytest.fixture(params=CONFIGS)
def family(request, tmp_path):
    """(name, folder) of a saved model."""
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[request.param](ids))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return request.param, tmp_path / "model"


def test_log_probs_of_a_batch_are_those_of_single_sequences(family):
    _, folder = family
    policy = load_policy(str(folder), torch.device("cpu"), trainable=False)
    assert policy.attention.packs
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS[:3]], policy.tokenizer, None, 99).kept
    rows = [(prompts[0], [9, 8, 7]), (prompts[0], [30, 31]), (prompts[1], [5]), (prompts[2], [4, 5, 6, 7, 8])]
    group = torch.tensor([0, 0, 1, 2])
    batch = make_sequences([p.token_ids for p, _ in rows], [r for _, r in rows], policy.pad_id, group)
    got = response_logps(policy, batch, 1.0, 10**6)
    for i, (prompt, response) in enumerate(rows):
        ids = torch.tensor([[*prompt.token_ids, *response]])
        with torch.no_grad():
            logps = torch.log_softmax(policy.model(input_ids=ids).logits[0].float(), -1)
        expected = [logps[len(prompt.token_ids) - 1 + t, token] for t, token in enumerate(response)]
        assert torch.allclose(got[i, : len(response)], torch.stack(expected), atol=1e-5)


def test_decoding_with_a_cache_samples_as_full_forwards_do(family):
    _, folder = family
    policy = load_policy(str(folder), torch.device("cpu"), trainable=False)
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS[:2]], policy.tokenizer, None, 99).kept
    rollout = sample(policy, prompts, 2, RolloutConfig(max_response_tokens=12), seed=3, step=0)
    uniforms = draw_uniforms(prompts, 2, 12, 3, 0)
    for row, prompt in enumerate(rollout.prompts):
        ids = list(prompt.token_ids)
        response = rollout.sequences.response_ids[row][rollout.sequences.response_mask[row]].tolist()
        for t, token in enumerate(response):
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([ids])).logits[:, -1]
            assert sample_tokens(logits, uniforms[row, t : t + 1], 1.0, 1.0)[0].item() == token
            ids.append(token)


def test_dropout_stays_off_while_activations_are_recomputed(tmp_path):
    """OPT drops activations by each layer's own training flag, which transformers needs for gradient checkpointing."""
    tokenizer = make_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    config = OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.5, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), torch.device("cpu"), True, ModelConfig(gradient_checkpointing=True))
    batch = make_sequences([[5, 6, 7]], [[8, 9]], policy.pad_id)
    expected = response_logps(policy, batch, 1.0, 99)
    with policy.recomputing():
        assert torch.equal(response_logps(policy, batch, 1.0, 99), expected)


def test_a_step_trains(family, tiny_arguments, tmp_path):
    _, folder = family
    options = [f"--model.path={folder}", "--steps=1", "--evaluation.prompts=0", f"--out={tmp_path / 'run'}"]
    train.run_command([*tiny_arguments, *options])
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["skipped"] == 0
    assert record["grad_norm"] > 0
    assert abs(record["kl"]) < 1e-4
    assert record["ratio_max"] == 1.0
