"""Dry run: compute what a configuration would do, without loading a model's weights."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .common.adapter_folder import base_of
from .common.distributed import ALONE, World
from .common.errors import UserError, first_line
from .common.hub import require_model
from .config.schema import DUAL_EVERY, Config
from .data.sources import load_data
from .gate.prompts import gate_data
from .memory.budget import free_bytes, pick, with_micro_batches
from .memory.description import describe_memory
from .memory.process import Process
from .memory.scorers import planned_scorer_bytes
from .models.adapters import add_lora
from .models.policy import choose_device
from .models.quantised import require_trainable
from .rollout.engine import check_engine
from .rollout.stop_tokens import stop_id
from .setup import find_assets, model_path, shards_of


def describe_batch(config: Config, world: World = ALONE) -> str:
    """Describe in one line how prompts, samples, epochs and minibatches make up a step."""
    r, o = config.rollout, config.optimizer
    responses = r.prompts_per_step * r.samples_per_prompt
    samples = f"{r.prompts_per_step} prompts x {r.samples_per_prompt} samples = {responses} responses"
    if config.algorithm.on_pairs:
        samples = f"{r.prompts_per_step} pairs, and every {DUAL_EVERY} steps {samples} of the policy, all"
    return (
        f"batch: {samples} of <= {r.max_response_tokens} tokens; "
        f"{o.epochs} epochs x {o.minibatches} minibatches = {o.epochs * o.minibatches} "
        f"optimiser steps per rollout, {config.steps} rollouts; micro-batches of <= {o.micro_batch_tokens} tokens"
        + describe_world(config, world)
    )


def describe_world(config: Config, world: World) -> str:
    """Describe how the processes share the work; return "" for one process."""
    if world.size == 1:
        return ""
    shards = shards_of(config, world)
    if shards == 1:
        return f"; {world.size} processes, each with all weights (data parallel)"
    copies = f" in {world.size // shards} copies (HSDP)" if shards < world.size else ""
    return f"; {world.size} processes, trained weights over {shards} each{copies} by FSDP2"


def dry_run(config: Config, console: Console, world: World = ALONE, trust: bool = False) -> None:
    """Read tokenizer, shapes and prompts, and print the arithmetic of memory and of a batch.

    trust: run Python code that comes with the model. Raises UserError if the model or the prompts cannot be read.
    """
    folder = world.from_first(lambda: find_assets(config, console))
    path = model_path(config, folder)
    require_model(path, "model.path")
    path = base_of(path, "model.path") or path  # an adapter is merged, so that the shapes are those of its base
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        shape = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    except Exception as error:
        raise UserError(f"model.path: cannot load {path!r}: {first_line(error)}") from error
    require_trainable(shape, config.model.lora_rank, path)
    version = check_engine(config, world.size, shape)
    with torch.device("meta"):
        dtype = torch.float32 if not config.model.lora_rank else getattr(torch, config.model.dtype)
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=trust)
        if config.model.lora_rank:
            add_lora(model.requires_grad_(False), config.model.lora_rank)
    parameters = sum(p.numel() for p in model.parameters())
    device = choose_device(config.model.device)
    console.print(f"model: {path}, {parameters / 1e6:.1f} M parameters, on {device}", markup=False, highlight=False)
    text = shape.get_text_config()
    for token in config.rollout.stop_tokens:
        stop_id(tokenizer, token, text.vocab_size)
    train, held_out, _ = load_data(config, folder, tokenizer, (), text, console)
    prompts = [*itertools.chain(*gate_data(config, folder, train, tokenizer, text, console), held_out)]
    process = Process(
        config,
        model,
        text.vocab_size,
        shards=shards_of(config, world),
        processes=world.size,
        prompt_tokens=max(len(prompt.token_ids) for prompt in prompts),
        scorers=planned_scorer_bytes(config, device.type, trust),
    )
    if config.optimizer.micro_batch_tokens == "auto":
        choice = pick(process, free_bytes(device), is_loaded=False)
        console.print(choice.describe(), markup=False, highlight=False)
        process = replace(process, config=with_micro_batches(config, choice.tokens))
    console.print(describe_batch(process.config, world), markup=False, highlight=False)
    if version:
        console.print(f"rollout: vLLM {version} of {config.rollout.vllm_python}", markup=False, highlight=False)
    console.print("memory:\n" + describe_memory(process), markup=False, highlight=False)
