"""The sampling of responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt


@dataclass(frozen=True)
class RolloutConfig:
    """The sampling of responses from the policy."""

    prompts_per_step: PositiveInt = 4
    """Number of prompts in one rollout batch, the data of one step; with methods cdpo and repo_dpo one pair each."""
    samples_per_prompt: PositiveInt = 4
    """Number of responses to each prompt, the group of the leave-one-out baseline; at least 2 unless
    algorithm.advantages is gae. With methods cdpo and repo_dpo: responses of the policy to each prompt in the steps
    that move lambda."""
    max_response_tokens: PositiveInt = 40
    """Limit of a response's length in tokens, its end-of-sequence token included."""
    stop_tokens: list[int | str] = field(default_factory=list)
    """Tokens that end a response besides the model's end-of-sequence tokens: ids, or texts of one token each. The
    token that the chat template puts after an answer is added by itself."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """What becomes of responses that reach max_response_tokens without a stop token. keep: they are like others. mask:
    their tokens are left out of the losses, their scores out of the baselines. penalise: subtract truncation_penalty
    from their reward."""
    truncation_penalty: NonNegativeFloat = 1.0
    """Amount, in units of the reward, that truncated: penalise subtracts."""
    temperature: PositiveFloat = 1.0
    """Divide the logits by this when sampling, and in the loss."""
    top_p: ClosedUnitInterval = 1.0
    """Sample from the most likely tokens that together have this probability; > 0. 1: from all. Below 1 responses are
    not drawn from the policy's own distribution, which biases the ratio."""
    batch_size: PositiveInt = 64
    """Largest number of responses to decode together; the samples of one prompt always stay together, but not with
    vllm."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """What samples the responses of training; evaluations always sample with transformers. vllm: vLLM in a process of
    its own, for runs of one process; bit-exact resume is then off."""
    vllm_python: str = ".venv-vllm/bin/python"
    """Python of the environment that has vLLM, which `make vllm-env` builds; only for engine vllm."""
