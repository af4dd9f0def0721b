"""The memory that one micro-batch of the update takes on the CPU, as PyTorch's allocator counts it."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedConfig

from repo.config.schema import Config, ModelConfig, OptimizerConfig, RolloutConfig
from repo.data.sequences import Sequences, make_sequences
from repo.memory.process import Process
from repo.models.actor import Actor
from repo.models.adapters import add_lora
from repo.models.layout import choose_attention
from repo.models.matmul import Matmul
from repo.models.policy import Policy
from repo.training.accumulation import Accumulator
from repo.training.advantages import Advantages
from repo.training.batch import Batch

CPU = torch.device("cpu")
PROMPT, RESPONSE, SAMPLES, GROUPS = 20, 50, 3, 2  # tokens, tokens, responses of a prompt, prompts of a batch

TYPES: dict[str, dict[str, Any]] = {
    "fp32": {"matmul_dtype": "float32"},
    "fp32, products in bf16": {"matmul_dtype": "bfloat16"},
    "bf16": {"dtype": "bfloat16"},
}


def make_config(types: str, lora_rank: int, recomputes: bool) -> Config:
    """A configuration in which a batch of GROUPS prompts makes one micro-batch. types: a key of TYPES."""
    model = ModelConfig(device="cpu", lora_rank=lora_rank, gradient_checkpointing=recomputes, **TYPES[types])
    rollout = RolloutConfig(prompts_per_step=GROUPS, samples_per_prompt=SAMPLES, max_response_tokens=RESPONSE)
    return Config(model=model, rollout=rollout, optimizer=OptimizerConfig(micro_batch_tokens=4096))


def make_policy(shape: PreTrainedConfig, settings: ModelConfig) -> Policy:
    """A policy with random weights, as load_policy makes it, but for a tokenizer."""
    torch.manual_seed(0)
    dtype, rank = getattr(torch, settings.dtype), settings.lora_rank
    model = AutoModelForCausalLM.from_config(shape, dtype=dtype if rank else torch.float32)
    model.eval().requires_grad_(not rank)
    if rank:
        add_lora(model, rank)
    autocast = None if model.dtype == dtype else dtype
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        attention = choose_attention(model, CPU, dtype)
    assert attention.packs
    recomputes, matmul = settings.gradient_checkpointing, Matmul(settings.matmul_dtype == "bfloat16")
    return Policy(model, None, (0,), 0, CPU, attention, autocast=autocast, recomputes=recomputes, matmul=matmul)


def process_of(config: Config, policy: Policy) -> Process:
    """What the library's arithmetic is told about the run."""
    vocabulary = policy.model.config.vocab_size
    known = {"attention": policy.attention, "rounds": policy.matmul.half, "scorers": 0}
    return Process(config, policy.model, vocabulary, prompt_tokens=PROMPT, **known)


def make_sequences_of_full_length() -> Sequences:
    """Responses of RESPONSE tokens to prompts of PROMPT tokens."""
    rows = GROUPS * SAMPLES
    group = torch.arange(GROUPS).repeat_interleave(SAMPLES)
    return make_sequences([[5] * PROMPT] * rows, [[6] * RESPONSE] * rows, 0, group)


def update_peak(config: Config, policy: Policy) -> int:
    """Bytes that the real update adds at its peak to weights and their gradients."""
    sequences = make_sequences_of_full_length()
    zeros = torch.zeros(len(sequences.group))
    advantages = Advantages(zeros + 1, zeros, zeros + 1)
    batch = Batch(sequences, advantages, zeros, torch.zeros(sequences.response_ids.shape), 1.0, 0.02)
    for parameter in policy.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    accumulator = Accumulator(Actor(policy), config)
    return allocated_peak(lambda: accumulator.backward(batch, torch.arange(len(zeros))))


def allocated_peak(call: Callable[[], object]) -> int:
    """Most bytes that a call holds at once, from each allocation and release of PyTorch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
