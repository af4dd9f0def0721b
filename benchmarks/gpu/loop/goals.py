"""Goals of the loop, and what was measured before: on one H200, torch 2.11, triton 3.6, at commit 4ef1d7e."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.loop.models import Shape

SMALL, LARGE = "Qwen2.5-0.5B shape", "Llama-3.1-8B shape, LoRA 16"
UPDATE, FIRST, REFERENCE, DECODE, LEAVING, WHOLE = (
    "update", "first update", "reference", "decoding", "decoding, rows leave", "whole step",
)  # fmt: skip
FIRST_DECODE = "first decoding"


@dataclass(frozen=True)
class Goal:
    """What a row is to reach, and what it was, as the table shows both."""

    goal: str = ""
    before: str = ""


GOALS = {
    SMALL: {
        UPDATE: Goal(">= 300 TFLOP/s", "0.83 s, 120 TFLOP/s, peak 32 GB (64 x 512 tokens)"),
        FIRST: Goal("<= 2 x the median", "11.4 s, the next 4.1 s (128 x 256 tokens)"),
        REFERENCE: Goal("", "0.195 s, 171 TFLOP/s (64 x 512 tokens)"),
        DECODE: Goal("<= 2.5 ms a step", "8.6 ms a step, 7.4 k tokens/s"),
        WHOLE: Goal("<= 1.6 s", "7.7 s"),
    },
    LARGE: {
        UPDATE: Goal(">= 400 TFLOP/s", "3.9 s, 259 TFLOP/s, peak 140 GB (64 x 512 tokens)"),
        FIRST: Goal("<= 2 x the median"),
        REFERENCE: Goal("", "1.14 s, 440 TFLOP/s (64 x 512 tokens)"),
    },
}

_QWEN = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768, "tie_word_embeddings": True,
}  # fmt: skip
_LLAMA = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    "tie_word_embeddings": False,
}  # fmt: skip
SHAPES = {
    SMALL: Shape("Qwen2", _QWEN, whole=(16, 8, 256)),
    LARGE: Shape("Llama", _LLAMA, lora=16),
}
_TINY = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16,
}  # fmt: skip
_FEW = {"prompts": 2, "samples": 2, "tokens": (2, 8), "decoded": 6, "micro_batch": 64, "prompt_tokens": (2, 5)}
REHEARSED = {
    SMALL: Shape("Qwen2", {**_TINY, "tie_word_embeddings": True}, whole=(2, 4, 4), **_FEW),  # type: ignore[arg-type]
    LARGE: Shape("Llama", _TINY, lora=2, **_FEW),  # type: ignore[arg-type]
}
