"""Memory: what a run will hold, by arithmetic, and how the C library keeps it."""

from __future__ import annotations

import ctypes
import sys

from .config import Config

GIB = 2.0**30
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step instead of returning them to the kernel.

    A training step on a CPU allocates and frees gigabytes of activations; by default each block is mapped, zeroed page
    by page and unmapped again, which took a third of the update's time. Does nothing on other C libraries.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def describe_memory(config: Config, parameters: int, vocabulary: int) -> str:
    """Bytes by arithmetic: weights, gradients, Adam, the logits of a micro-batch. Activations come on top."""
    rollout, optimizer = config.rollout, config.optimizer
    weights = 4 * parameters
    responses = rollout.prompts_per_step * rollout.samples_per_prompt
    rows = min(optimizer.micro_batch_tokens, responses * rollout.max_new_tokens)
    every = responses * (config.data.max_prompt_tokens + rollout.max_new_tokens)
    lines = {
        "policy weights fp32": weights,
        "reference weights fp32": weights,
        "gradients fp32": weights,
        "AdamW states fp32": 2 * weights,
        "packed decode weights (CPU rollout)": weights,
        f"logits and their gradient, <= {rows} rows x {vocabulary}, fp32, one buffer": 4 * rows * vocabulary,
    }
    text = [f"  {size / GIB:7.2f} GiB  {name}" for name, size in lines.items()]
    avoided = 4 * every * vocabulary
    text.append(f"  {avoided / GIB:7.2f} GiB  avoided: logits of every prompt and response token at once")
    return "\n".join(text)
