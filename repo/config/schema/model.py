"""The policy and the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import NonNegativeInt


@dataclass(frozen=True)
class ModelConfig:
    """The policy and the reference, which start as the same model."""

    path: str = "embedded"
    """Folder or hub name of a causal LM. "embedded": SmolLM2-135M-Instruct from the assets folder ($REPO_ASSETS)."""
    device: str = "auto"
    """Torch device, e.g. "cpu" or "cuda". "auto": CUDA if it is available, else the CPU."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the policy's forward passes and of frozen weights, which are rounded to it when loaded. Trained weights
    and critics with models of their own stay float32."""
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type in which linear layers multiply on a CPU where dtype is float32, in training and in the reference. bfloat16
    takes half of the time on CPUs with AVX512_BF16 or AMX; weights, other layers and sums stay float32. auto: bfloat16
    on such CPUs for models of a hidden width of 256 or more whose log-probabilities it moves by at most 0.1 nats a
    token, else float32."""
    lora_rank: NonNegativeInt = 0
    """Rank of LoRA adapters on every linear layer except the LM head and the routers of experts, with alpha = 2 x rank;
    needs the package peft. Experts that share one tensor get none. 0: no adapters, all weights are trained."""
    gradient_checkpointing: bool = False
    """Recompute the policy's activations in the backward pass: takes less memory and one more forward pass."""
    shard: NonNegativeInt = 1
    """Number of torchrun processes that FSDP2 splits one copy of trained weights, gradients and optimiser states over;
    must divide the number of processes. 1: no splitting, each process has a copy. 0: all processes split one copy."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the policy's decoder layers with torch.compile. "auto": on CUDA, if a trial at start computes the same;
    the trial takes a while, less when the compiler's cache on disk has the layers. With model.shard other than 1 "auto"
    means false."""
