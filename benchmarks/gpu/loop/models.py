"""Policies of known shapes with random weights, made where they run, without a folder and without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch

from repo.config.schema import Config, ModelConfig, OptimizerConfig, RolloutConfig
from repo.data.prompts import Prompt
from repo.models import policy as loading
from repo.models.policy import Policy, load_policy, load_reference

PAD, STOP = 0, 1


@dataclass(frozen=True)
class Shape:
    """A model and what is measured of it.

    Args:
        family: name of the config class in transformers.
        sizes: arguments of the config class.
        lora: rank of the adapters; 0: all weights are trained.
        prompts, samples: of the batch of an update and of a rollout.
        tokens: the shortest and the longest response of an update.
        decoded: tokens of each response of a rollout.
        whole: prompts, samples and tokens of a whole step, or None.
        micro_batch: tokens.
    """

    family: str
    sizes: dict[str, Any]
    lora: int = 0
    prompts: int = 8
    samples: int = 8
    tokens: tuple[int, int] = (64, 512)
    decoded: int = 256
    whole: tuple[int, int, int] | None = None
    micro_batch: int = 16_384
    prompt_tokens: tuple[int, int] = field(default=(20, 60))


@dataclass(frozen=True)
class Models:
    """A policy with its reference and the configuration of a run."""

    config: Config
    policy: Policy
    reference: Policy


class NoTokenizer:
    """What the loop asks of a tokenizer: ids, and texts that nobody reads."""

    pad_token_id, eos_token_id, chat_template = PAD, STOP, None

    def batch_decode(self, responses: list[list[int]], **_: Any) -> list[str]:
        """Return an empty text for each response."""
        return ["" for _ in responses]


def make_models(shape: Shape, device: torch.device, recompute: bool) -> Models:
    """Make policy and reference as a run loads them: in bf16, fp32 masters of the trained weights.

    recompute: recompute activations in the backward pass.
    """
    settings = ModelConfig(
        path="random", device=str(device), dtype="bfloat16", lora_rank=shape.lora, gradient_checkpointing=recompute
    )
    rollout = RolloutConfig(
        max_response_tokens=shape.decoded, samples_per_prompt=shape.samples, prompts_per_step=shape.prompts,
        batch_size=max(shape.prompts * shape.samples, (shape.whole or (0, 0))[0] * (shape.whole or (0, 0))[1]),
    )  # fmt: skip
    # a small rate, so that the work stays the same
    optimizer = OptimizerConfig(lr=1e-7, micro_batch_tokens=shape.micro_batch)
    config = Config(model=settings, rollout=rollout, optimizer=optimizer)
    with _random_weights(shape):
        policy = load_policy("random", device, True, settings)
        return Models(config, policy, load_reference(policy, "random", settings))


@contextmanager
def _random_weights(shape: Shape) -> Iterator[None]:
    """Open the context in which `load_policy` gets new models of this shape; everything else it does itself."""
    import transformers

    config = getattr(transformers, f"{shape.family}Config")(**shape.sizes, eos_token_id=STOP, pad_token_id=PAD)

    def load(path: str, device: torch.device, dtype: torch.dtype, trust: bool) -> tuple[Any, NoTokenizer, None]:
        torch.manual_seed(0)
        with device:
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype), NoTokenizer(), None

    with patch.object(loading, "_load", load), patch.object(loading, "require_model", lambda *_: None):
        yield


def make_prompts(shape: Shape, count: int, vocabulary: int, draw: torch.Generator) -> list[Prompt]:
    """Make prompts of random tokens and lengths."""
    lengths = torch.randint(shape.prompt_tokens[0], shape.prompt_tokens[1] + 1, (count,), generator=draw).tolist()
    ids = [torch.randint(2, vocabulary, (n,), generator=draw).tolist() for n in lengths]
    return [Prompt(str(i), "", "", tuple(tokens)) for i, tokens in enumerate(ids)]
