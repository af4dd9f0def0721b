"""How a policy is held: LoRA beside a frozen base that is its own reference, bf16, recomputed activations."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from repo import train
from repo.common.errors import UserError
from repo.config.schema import Config, ModelConfig, OptimizerConfig, RolloutConfig
from repo.data.packing import flat
from repo.data.prompts import Prompt, tokenize_prompts
from repo.memory.description import describe_memory
from repo.memory.process import Process
from repo.models.actor import Actor
from repo.models.policy import load_policy, load_reference
from repo.rollout.sample import sample
from repo_kernels.layers import onednn_linear
from tests.support import padded_forward
from tests.support.predictions import response_logps
from tests.support.tiny import QUESTIONS

CPU = torch.device("cpu")


@pytest.fixture
def load(tiny_model):
    return lambda **fields: load_policy(str(tiny_model), CPU, True, ModelConfig(**fields))


def rollout_of(policy, length=9):
    prompts = tokenize_prompts([Prompt(q, q, "") for q in QUESTIONS], policy.tokenizer, None, 200).kept
    return sample(policy, prompts, 2, RolloutConfig(max_response_tokens=length), seed=0, step=0)


def train_a_little(policy):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def test_lora_starts_as_the_base_and_its_reference_stays_the_base(load, tiny_model):
    config = ModelConfig(lora_rank=4)
    policy, base = load(lora_rank=4), load_policy(str(tiny_model), CPU, False)
    reference = load_reference(policy, str(tiny_model), config)
    sequences = rollout_of(policy).sequences
    expected = response_logps(base, sequences, 1.0, 500)
    assert torch.allclose(response_logps(policy, sequences, 1.0, 500), expected, atol=1e-5)
    train_a_little(policy)
    assert torch.equal(response_logps(reference, sequences, 1.0, 500), expected)
    assert (response_logps(policy, sequences, 1.0, 500) - expected).abs().max() > 0.01
    assert rollout_of(reference).texts == rollout_of(base).texts != rollout_of(policy).texts
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name and "lm_head" not in name for name in trained)


def test_lora_trains_resumes_and_exports_an_adapter(tiny_arguments, tiny_model, tmp_path):
    pytest.importorskip("peft")
    options = [*tiny_arguments, "--model.lora_rank=4", "--evaluation.prompts=0"]
    train.run_command([*options, f"--out={tmp_path / 'whole'}"])
    train.run_command([*options, f"--out={tmp_path / 'part'}", "--steps=2"])
    train.run_command(["--resume", str(tmp_path / "part"), "--steps=4"])
    folders = [tmp_path / name for name in ("whole", "part")]
    adapters = [load_file(f / "final" / "adapter_model.safetensors") for f in folders]
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])
    saved = load_file(next((tmp_path / "whole" / "checkpoints").glob("step-*")) / "state.safetensors")
    assert all("lora_" in name for name in saved)
    lines = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert lines[-1]["kl"] > 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "final")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(exported(ids).logits, base(ids).logits, atol=1e-4)


def test_the_random_factor_of_lora_is_the_same_at_every_start(load):
    starts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(1, generator=torch.Generator().manual_seed(seed))
        starts.append({name: p for name, p in load(lora_rank=2).model.named_parameters() if "lora_A" in name})
        assert torch.equal(torch.rand(1), expected)  # and the random state is left as it was
    assert starts[0]
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_lora_without_peft_is_a_sentence(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"model.lora_rank needs the package peft: pip install peft"):
        load(lora_rank=2)


def test_bf16_computes_in_bf16_and_trains_fp32_weights(load):
    policy, exact = load(dtype="bfloat16"), load()
    assert policy.attention.packs
    sequences = rollout_of(exact).sequences
    (packed,) = Actor(policy).parts(sequences, torch.arange(12), 10**6)
    arguments, logps = Actor(policy)(packed, lambda states, _: (states.head_arguments(), states.logps(1.0)))
    assert arguments["hidden"].dtype == torch.bfloat16
    assert arguments["weight"] is policy.model.lm_head.weight
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    difference = logps - flat(packed, padded_forward.response_logps(exact, sequences))
    assert 0 < difference.abs().max() < 0.05 * logps.abs().max()
    logps.sum().backward()
    assert {p.grad.dtype for p in policy.model.parameters()} == {torch.float32}
    frozen = load(dtype="bfloat16", lora_rank=2)
    dtypes = {("lora_" in name, p.dtype) for name, p in frozen.model.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}


@pytest.mark.parametrize("recompute", [False, True])
def test_bf16_stays_bf16_while_training_on_any_processor(load, monkeypatch, recompute):
    monkeypatch.setattr(onednn_linear, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(onednn_linear, "multiplies", lambda *_: False)
    policy = load(dtype="bfloat16", gradient_checkpointing=recompute)
    sequences, dtypes = rollout_of(load()).sequences, []
    policy.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    (packed,) = Actor(policy).parts(sequences, torch.arange(12), 10**6)
    expected = Actor(policy)(packed, lambda states, _: states.logps(1.0))
    with policy.recomputing():
        found = Actor(policy)(packed, lambda states, _: states.logps(1.0))
        found.sum().backward()
    assert torch.equal(found, expected)
    assert dtypes == [torch.bfloat16] * (3 if recompute else 2)


@pytest.mark.parametrize("lora_rank", [0, 3])
def test_recomputed_activations_give_the_same_gradient_and_are_off_elsewhere(load, lora_rank):
    gradients, calls = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        policy = load(gradient_checkpointing=recompute, lora_rank=lora_rank)
        seen = []
        policy.model.model.layers[0].input_layernorm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        sequences = rollout_of(load()).sequences
        actor = Actor(policy)
        (packed,) = actor.parts(sequences, torch.arange(12), 10**6)
        with policy.recomputing():
            actor(packed, lambda states, _: states.logps(1.0)).sum().backward()
        calls.append(len(seen))
        gradients.append([p.grad for p in policy.model.parameters() if p.requires_grad])
        assert not any(m.training for m in policy.model.modules())
    assert calls == [1, 2]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_memory_counts_what_is_trained(load):
    policy = load(lora_rank=4)
    config = Config(model=ModelConfig(lora_rank=4), optimizer=OptimizerConfig())
    text = describe_memory(Process(config, policy.model, 380))
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    assert f"{trained / 1e6:.1f} M trained" in text
    assert "reference weights: the policy without its adapter" in text
