"""Memory: the bytes that a run will hold, computed from the sizes of its tensors."""

from __future__ import annotations

import torch
from torch import nn

from repo_kernels.losses.chunks import Budget, HeadSizes

from ..config.schema import Config

GIB = 2.0**30
STATE_BYTES = {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 * 4 / 256}  # per trained weight; 8bit: fp32 scale per 256


def describe_memory(
    config: Config, model: nn.Module, vocabulary: int, critics: nn.Module | None = None, shards: int = 1
) -> str:
    """List what a process holds, in GiB: weights, AdamW's states, and what update and rollout add. Activations, the KV
    cache and scorers are not counted.

    model: the policy, not sharded yet, on any device, also "meta". vocabulary: rows of the LM head. critics: None if
    they are not loaded yet. shards: processes that split one copy of the trained weights.
    """
    rollout, optimizer, settings = config.rollout, config.optimizer, config.model
    weights, trained = _parameters(model), _parameters(model, trained_only=True)
    frozen = 2 if settings.dtype == "bfloat16" else 4
    rows = min(
        optimizer.micro_batch_tokens,
        rollout.prompts_per_step * rollout.samples_per_prompt * rollout.max_response_tokens,
    )
    lora, per_trained = settings.lora_rank > 0, 8 + STATE_BYTES[optimizer.state_dtype]
    always = {
        f"policy weights ({trained / 1e6:.1f} M trained, fp32)": 4 * trained / shards + frozen * (weights - trained),
        "reference weights" + (": the policy without its adapter" if lora else ""): 0 if lora else frozen * weights,
        f"AdamW states {optimizer.state_dtype}": STATE_BYTES[optimizer.state_dtype] * trained / shards,
    }
    if shards > 1:
        always[f"whole copy for sampling {settings.dtype}"] = frozen * weights
    if critics is not None and len(list(critics.parameters())):
        name = f"critics with gradients and AdamW states {optimizer.state_dtype}"
        always[name] = per_trained * _parameters(critics) / shards
    logits = 4 * rows * vocabulary
    head = _head_sizes(config, model, vocabulary)
    chunk = Budget(_device_type(config)).rows(rows, head)
    update = {
        "update: gradients fp32": 4 * trained / shards,
        f"update: logits of {chunk} of {rows} rows x {vocabulary} and their gradient": chunk * head.row_bytes,
        "update: a micro-batch's gradient of the head": head.weight_bytes,
        "update: a micro-batch's gradient of the head's input": head.peak_bytes(rows, 0) - head.weight_bytes,
    }
    sampling = {}
    if settings.dtype == "bfloat16" and not lora and shards == 1:
        sampling["rollout: decode weights bfloat16"] = 2 * trained
    elif _device_type(config) == "cpu":
        sampling["rollout: packed decode weights (CPU)"] = 4 * weights
    total = sum(always.values()) + max(sum(update.values()), sum(sampling.values()))
    uncounted = "activations, KV cache and scorers"
    if critics is None and config.algorithm.advantages == "gae" and config.critic.init_from == "scorers":
        uncounted += f", nor the critics, {per_trained:g} bytes per parameter of the scorers they copy"
    text = [f"  {size / GIB:7.2f} GiB  {name}" for name, size in (always | update | sampling).items()]
    text.append(f"  {total / GIB:7.2f} GiB  at most at once, without {uncounted}")
    text.append(f"  {logits / GIB:7.2f} GiB  avoided: the logits of all {rows} rows")
    return "\n".join(text)


def _device_type(config: Config) -> str:
    """Return "cuda" where the run would take a GPU, else "cpu"."""
    asked = config.model.device.partition(":")[0]
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def _head_sizes(config: Config, model: nn.Module, vocabulary: int) -> HeadSizes:
    """Describe the loss from the hidden states of the model: its head is a matrix of `vocabulary` rows."""
    heads = [p for p in model.parameters() if p.ndim == 2 and len(p) == vocabulary]
    width = max((head.shape[1] for head in heads), default=0)
    half = config.model.dtype == "bfloat16" and _device_type(config) == "cuda"
    factors = torch.bfloat16 if half else torch.float32
    return HeadSizes(vocabulary, width, factors, torch.float32, with_weight=any(head.requires_grad for head in heads))


def _parameters(module: nn.Module, trained_only: bool = False) -> int:
    """Count the parameters of a module, all or the trained ones only."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
