"""Process: what one process of a run holds, as far as memory depends on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from repo_kernels.layers import packed_attention as cpu_attention
from repo_kernels.losses.heads.chunks import Budget, HeadSizes

from ..common.config_fields import head_size
from ..config.schema import Config
from ..models.layout import Attention
from ..models.matmul import may_round
from .activations import Pass
from .stand_ins import AttentionKernel


@dataclass(frozen=True)
class Process:
    """What a process holds.

    config: of the run.
    model: the policy, with its adapters and not sharded yet, on any device, also "meta".
    vocabulary: rows of the LM head.
    critics: None if they are not loaded yet.
    shards: processes that split one copy of the trained weights. processes: all of the run.
    prompt_tokens: tokens of the longest prompt; None: data.max_prompt_tokens.
    attention: the way the policy reads, None if it has not been tried yet.
    rounds: fp32 linear layers multiply in bfloat16 on the CPU; None if that has not been chosen yet.
    copied: trained weights are cast once per optimiser step; None if that has not been tried yet.
    scorers: bytes of the weights of scorers and judge beside the policy; None if they are not known.
    """

    config: Config
    model: nn.Module
    vocabulary: int
    critics: nn.Module | None = None
    shards: int = 1
    processes: int = 1
    prompt_tokens: int | None = None
    attention: Attention | None = None
    rounds: bool | None = None
    copied: bool | None = None
    scorers: int | None = None

    @property
    def device(self) -> str:
        """Type of the device: "cuda" where the run would take a GPU, else "cpu"."""
        asked = self.config.model.device.partition(":")[0]
        return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked

    @property
    def dtype(self) -> torch.dtype:
        """Type of the forward pass."""
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        return dtype

    @property
    def half(self) -> torch.dtype | None:
        """Type of autocast, None where the weights themselves have the type of the forward pass."""
        settings = self.config.model
        return self.dtype if settings.dtype == "bfloat16" and not settings.lora_rank else None

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return self.prompt_tokens or self.config.data.max_prompt_tokens

    @property
    def batch_tokens(self) -> int:
        """Most tokens of this process's share of a rollout batch, in the layout of its forward passes."""
        r = self.config.rollout
        prompts = -(-r.prompts_per_step // self.processes)
        own, response = self.longest_prompt, r.max_response_tokens - 1
        samples = 2 if self.config.algorithm.on_pairs else r.samples_per_prompt
        if self.attention is not None and not self.attention.packs:
            return prompts * samples * (own + response)
        return prompts * (own + samples * response)

    def head(self) -> HeadSizes:
        """Describe the loss from the hidden states of the model: its head is a matrix of `vocabulary` rows."""
        heads = [p for p in self.model.parameters() if p.ndim == 2 and len(p) == self.vocabulary]
        width = max((head.shape[1] for head in heads), default=0)
        half = self.dtype == torch.bfloat16 and self.device == "cuda"
        factors = torch.bfloat16 if half else torch.float32
        trained = any(head.requires_grad for head in heads)
        return HeadSizes(self.vocabulary, width, factors, torch.float32, with_weight=trained)

    def kernel(self, config: Any) -> AttentionKernel:
        """Describe the kernel of attention; where it is not known yet, the one that takes most. config: the model's."""
        name = "" if self.attention is None else self.attention.name
        if self.device != "cpu":
            flash = name.startswith("FlashAttention")
            return AttentionKernel(self.half, repeats=not flash, joins=not flash, sums=flash)
        size = head_size(config.get_text_config())
        fits = cpu_attention.available(torch.device("cpu"), self.dtype, size)
        return AttentionKernel(self.half, joins=not fits)

    def update(self) -> Pass:
        """Describe the update's passes of the policy."""
        settings, config = self.config.model, getattr(self.model, "config", None)
        if config is None:
            raise ValueError(f"{type(self.model).__name__} is no causal LM of transformers")
        fused = self.device == "cpu" and self.dtype == torch.float32 and settings.compile is not True
        return Pass(
            self.device,
            self.kernel(config),
            self.half,
            settings.gradient_checkpointing,
            fused,
            self.multiplies_in_bf16(),
            Budget(self.device),
            self.head(),
            self.dtype if self.copied else None,
        )

    def multiplies_in_bf16(self) -> bool:
        """Tell whether fp32 linear layers multiply in bfloat16; before that is chosen, by what needs no trial."""
        if self.rounds is not None or self.device != "cpu" or self.dtype != torch.float32:
            return bool(self.rounds)
        return may_round(getattr(self.model, "config", None), self.config.model)

    def of_critic(self) -> Pass:
        """Describe the update's passes of a critic's own trunk, which computes in fp32."""
        kernel = AttentionKernel(None, repeats=self.device != "cpu", joins=True)
        return Pass(self.device, kernel, None, False, False, False, None, None)


def parameters_of(module: nn.Module, trained_only: bool = False) -> int:
    """Count the parameters of a module, all or the trained ones only."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
