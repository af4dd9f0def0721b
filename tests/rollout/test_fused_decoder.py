"""Decoding by one C++ call per token: the logits of a growing cache, and the models that it leaves to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from repo.config.schema import ModelConfig, RolloutConfig
from repo.data.prompts import Prompt
from repo.data.sequences import make_sequences
from repo.models.policy import Policy, load_policy
from repo.rollout import decoding
from repo.rollout.fused_decoder import FusedDecoder, why_unfused
from repo.rollout.kv_cache import GrowingDecoder
from repo.rollout.sample import sample
from repo_kernels.layers.decoding import available
from tests.rollout.test_decoding import CPU
from tests.rollout.test_decoding import SMALL as OTHERS_SMALL

pytestmark = pytest.mark.skipif(not available(), reason="the C++ backend was not built")
SMALL = {**OTHERS_SMALL, "vocab_size": 391}  # the last panel of the head is not full
FUSED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, head_dim=16),
    "llama with biases of attention": LlamaConfig(**SMALL, head_dim=16, attention_bias=True),
    "llama with rotary frequencies by length": LlamaConfig(
        **SMALL,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": MistralConfig(**SMALL, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, head_dim=16),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}
LEFT: dict[str, tuple[PretrainedConfig, str]] = {
    "other modules": (GPT2Config(vocab_size=391, n_embd=32, n_layer=2, n_head=4), "its modules are not those of Llama"),
    "more norms": (Gemma2Config(**SMALL, head_dim=16), "its layers have other parts than Llama's"),
    "other factors": (
        GraniteConfig(**{**SMALL, "num_attention_heads": 2}, residual_multiplier=0.3),
        "its logits would differ by",
    ),
    "one norm": (CohereConfig(**SMALL), "its layers have other parts than Llama's"),
    "narrow heads": (LlamaConfig(**SMALL, head_dim=8), "a width is no multiple of 16"),
    "biases of the MLP": (LlamaConfig(**SMALL, head_dim=16, mlp_bias=True), "its MLP has biases"),
    "a window": (
        MistralConfig(**SMALL, head_dim=16, sliding_window=8),
        "not every layer has full attention",
    ),
}


@pytest.fixture
def make_policy(tiny_model: Path) -> Callable[[PretrainedConfig], Policy]:
    policy = load_policy(str(tiny_model), CPU, trainable=True)

    def make(config: PretrainedConfig) -> Policy:
        torch.manual_seed(0)
        return replace(policy, model=AutoModelForCausalLM.from_config(config).eval())

    return make


def logits(policy: Policy, decoder: FusedDecoder | GrowingDecoder) -> torch.Tensor:
    """Decode prompts of different lengths, three samples each, of which most leave early."""
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(5, 380, (n,), generator=draw).tolist() for n in (3, 1, 7)]
    found = [decoder.start(make_sequences(prompts, [[]] * 3, policy.pad_id), 3)]
    rows = torch.arange(9)
    for kept in (None, None, [0, 2, 5, 7], None, [1, 3]):
        if kept is not None:
            assert decoder.keep(torch.tensor(kept))
            rows = rows[kept]
        found.append(decoder.step(torch.randint(5, 380, (len(rows),), generator=draw)))
    return torch.cat(found)


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_logits_are_those_of_a_growing_cache(name: str, make_policy: Callable[[PretrainedConfig], Policy]) -> None:
    policy = make_policy(FUSED[name])
    assert why_unfused(policy) == ""
    with policy.running():
        growing, fused = logits(policy, GrowingDecoder(policy.model, 6)), FusedDecoder(policy.model, 6)
        assert float((logits(policy, fused) - growing).abs().max()) <= 2e-5 * float(growing.abs().max())
        with fused.linears():
            assert float((logits(policy, fused) - growing).abs().max()) <= 2e-5 * float(growing.abs().max())
    assert not any("forward" in module.__dict__ for module in policy.model.modules())


@pytest.mark.parametrize("what", LEFT)
def test_models_of_other_shapes_are_left_to_others(
    what: str, make_policy: Callable[[PretrainedConfig], Policy]
) -> None:
    config, why = LEFT[what]
    assert why in why_unfused(make_policy(config))


@torch.no_grad()
def test_adapters_are_added_to_the_packed_weights_unless_they_are_off(tiny_model: Path) -> None:
    policy = load_policy(str(tiny_model), CPU, trainable=True, config=ModelConfig(lora_rank=2))
    assert why_unfused(policy) == ""
    draw = torch.Generator().manual_seed(3)
    for name, weight in policy.model.named_parameters():
        if "lora_B" in name:
            weight.copy_(torch.randn(weight.shape, generator=draw) / 20)
    reference, found = replace(policy, base_only=True), []
    for one in (policy, reference):
        with one.running():
            growing, fused = logits(one, GrowingDecoder(one.model, 6)), FusedDecoder(one.model, 6)
            with fused.linears():
                found.append(logits(one, fused))
        assert float((found[-1] - growing).abs().max()) <= 2e-5 * float(growing.abs().max())
    assert float((found[0] - found[1]).abs().max()) > 0.1 * float(found[1].abs().max())


@pytest.mark.parametrize("change", ["use_dora", "lora_bias", "lora_dropout"])
def test_other_adapters_are_left_to_others(tiny_model: Path, change: str) -> None:
    from peft import LoraConfig

    policy = load_policy(str(tiny_model), CPU, trainable=True)
    options = {change: 0.1 if change == "lora_dropout" else True}
    policy.model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options))
    assert why_unfused(policy) == "not every projection is an nn.Linear"


def test_half_precision_is_left_to_others(tiny_model: Path) -> None:
    half = load_policy(str(tiny_model), CPU, trainable=True, config=ModelConfig(dtype="bfloat16"))
    with half.running():
        assert why_unfused(half) == "autocast is on"


def prompts_of(policy: Policy) -> list[Prompt]:
    texts = ["One", "Two two", "Three three three"]
    return [Prompt(str(i), t, "", tuple(policy.tokenizer(t)["input_ids"])) for i, t in enumerate(texts)]


def test_rollouts_are_those_of_a_growing_cache(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(str(tiny_model), CPU, trainable=True)
    assert why_unfused(policy) == ""
    config = RolloutConfig(max_response_tokens=30, batch_size=8)
    fused = sample(policy, prompts_of(policy), 4, config, seed=0, step=0)
    monkeypatch.setattr(decoding, "why_unfused", lambda policy: "not wanted")
    growing = sample(policy, prompts_of(policy), 4, config, seed=0, step=0)
    assert fused.texts == growing.texts
    torch.testing.assert_close(fused.logps, growing.logps, rtol=0, atol=2e-5)


def test_each_rollout_packs_the_weights_anew(tiny_model: Path) -> None:
    policy = load_policy(str(tiny_model), CPU, trainable=True)
    config = RolloutConfig(max_response_tokens=12)
    before = sample(policy, prompts_of(policy), 2, config, seed=0, step=0)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(0.2)
    after = sample(policy, prompts_of(policy), 2, config, seed=0, step=0)
    assert before.texts != after.texts
