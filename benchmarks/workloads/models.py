"""Models that the benchmarks train: the embedded one, and shapes of known families with random weights for a GPU.

Nothing is downloaded: no time depends on the random weights, and the tokenizer is the embedded model's.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from repo import assets

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Shape:
    """A dense decoder with SwiGLU, grouped queries and rotary embedding.

    lora: rank of the adapter; 0: all weights are trained (fp32 masters, moments and gradients take 16 bytes a weight,
    so that 80 GB hold about 3 B of them).
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    lora: int = 0


# The published configurations of Qwen2.5 (0.5B, 1.5B, 3B) and Llama 3.1 (8B).
SHAPES = {
    "Qwen2.5-0.5B shape": Shape(896, 4864, 24, 14, 2, 151_936, True),
    "Qwen2.5-1.5B shape": Shape(1536, 8960, 28, 12, 2, 151_936, True),
    "Qwen2.5-3B shape": Shape(2048, 11_008, 36, 16, 2, 151_936, True, lora=16),
    "Llama-3.1-8B shape": Shape(4096, 14_336, 32, 32, 8, 128_256, False, lora=16),
    "tiny": Shape(64, 128, 2, 4, 2, 49_152, True),
}
GPU_MODELS = tuple(name for name in SHAPES if name != "tiny")


def folder_of(model: str) -> str:
    """Return the folder of the embedded model or of a shape (made for this process), or else the given folder."""
    if model == EMBEDDED:
        return str(assets.ensure() / "policy")
    return random_model(model) if model in SHAPES else model


def lora_rank(model: str) -> int:
    """Return the rank of the adapter that this model is trained with."""
    return SHAPES[model].lora if model in SHAPES else 0


@functools.cache
def random_model(name: str) -> str:
    """Write a Llama of this shape in bf16 (the tiny one in fp32) to a folder that lasts until the process ends."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    shape, folder = SHAPES[name], _keep(tempfile.TemporaryDirectory(prefix="repo-bench-"))
    tokenizer = AutoTokenizer.from_pretrained(assets.ensure() / "policy")
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    dtype = torch.float32 if name == "tiny" else torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def _keep(folder: tempfile.TemporaryDirectory[str]) -> str:
    _KEPT.append(folder)
    return str(Path(folder.name))
