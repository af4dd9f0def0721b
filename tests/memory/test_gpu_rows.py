"""The arithmetic beside two updates whose peak was measured on a GPU of 141 GB, and the preset for one of 80 GB.

Both rows: bf16 with fp32 masters, SDPA called once per run of equal lengths, no recomputation, 64 responses of 512
tokens to 8 prompts of 42, micro-batches of at most 16 384 tokens. A prompt's group has 42 + 8 x 511 tokens and stays
together, so that the largest pass holds three of them: 12 392 tokens.
"""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from repo.config.parse import PRESETS, load_config
from repo.config.schema import Config, EvaluationConfig, ModelConfig, OptimizerConfig, RolloutConfig
from repo.data.micro_batches import micro_batches
from repo.data.packing import pack
from repo.data.sequences import make_sequences
from repo.memory.activations import activations_of
from repo.memory.description import memory_of
from repo.memory.process import Process, parameters_of
from repo.memory.weights import loaded, trained
from repo.models.adapters import add_lora
from repo_kernels.losses.heads.chunks import Budget

QWEN = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
LLAMA = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256,
)  # fmt: skip
QWEN_7B = Qwen2Config(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
    vocab_size=152064,
)  # fmt: skip
BEAVER = LlamaConfig(vocab_size=32001)  # LLaMA 7B
CHUNK = 64_000_000  # bytes of logits at a time, when the rows were measured


def on_meta(shape, rank):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16 if rank else torch.float32)
        if rank:
            add_lora(model.requires_grad_(False), rank)
    return model


@pytest.mark.parametrize(("shape", "rank", "measured"), [(QWEN, 0, 32e9), (LLAMA, 16, 140e9)], ids=["0.5B", "8B LoRA"])
def test_the_peak_of_an_update_is_the_one_measured_on_a_gpu(shape, rank, measured):
    config = Config(
        model=ModelConfig(device="cuda", dtype="bfloat16", lora_rank=rank),
        rollout=RolloutConfig(prompts_per_step=8, samples_per_prompt=8, max_response_tokens=512),
        optimizer=OptimizerConfig(micro_batch_tokens=16384),
    )
    process = Process(config, on_meta(shape, rank), shape.vocab_size, prompt_tokens=42)
    group = torch.arange(8).repeat_interleave(8)
    sequences = make_sequences([[0] * 42] * 64, [[0] * 512] * 64, 0, group)
    parts = [pack(sequences, rows, True) for rows in micro_batches(sequences, torch.arange(64), 16384, True)]
    largest = max(parts, key=lambda part: part.tokens)
    assert largest.tokens == 12392
    how = replace(process.update(), budget=Budget("cuda", size=CHUNK))
    gradients = 4 * parameters_of(process.model, trained_only=True)
    always = sum(loaded(process).values()) + sum(trained(process).values()) + gradients
    assert always + activations_of(process.model, largest, how).peak == pytest.approx(measured, rel=0.15)


def test_the_preset_for_one_gpu_fits_80_gb_with_its_scorers():
    config = load_config(PRESETS / "7b-lora-one-gpu.yaml")
    config = replace(config, model=replace(config.model, device="cuda"))
    with torch.device("meta"):
        scorers = 2 * 2 * parameters_of(AutoModelForCausalLM.from_config(BEAVER))
    process = Process(config, on_meta(QWEN_7B, config.model.lora_rank), QWEN_7B.vocab_size, scorers=scorers)
    memory = memory_of(process)
    assert memory.activations is not None
    assert memory.peak < 0.9 * 80e9
    assert EvaluationConfig().judge != config.evaluation.judge == "none"
