"""Engine: what samples the rollout of a step, in this process with transformers, or with vLLM in another one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from ..common.errors import UserError
from ..config.schema import Config
from ..data.prompts import Prompt
from ..models.policy import Policy
from ..models.quantised import quantisation
from ..models.sharding import copy_weights
from .sample import Rollout, sample
from .vllm.engine import open_vllm
from .vllm.process import vllm_version


class RolloutEngine(Protocol):
    """What samples the rollout of a step."""

    def update(self, step: int) -> None:
        """Take over the policy's weights, from which step `step` samples. Every process calls it."""

    def sample(self, prompts: Sequence[Prompt], step: int, part: range | None = None) -> Rollout:
        """Sample rollout.samples_per_prompt responses to each prompt of a step.

        part: indices of the prompts to answer, adjacent ones; None: all.
        """

    def describe(self) -> str:
        """Describe it in a line."""


class TransformersEngine:
    """Samples with the model of transformers in this process."""

    def __init__(self, config: Config, policy: Policy, sampler: Policy) -> None:
        """policy: the trained one. sampler: what samples: the policy itself, or an unsharded copy."""
        self.config, self.policy, self.sampler = config, policy, sampler

    def update(self, step: int) -> None:
        """Copy the policy's weights into an unsharded copy, if there is one."""
        copy_weights(self.policy.model, self.sampler.model)

    def sample(self, prompts: Sequence[Prompt], step: int, part: range | None = None) -> Rollout:
        """Sample; see repo.rollout.sample.sample."""
        r = self.config.rollout
        return sample(self.sampler, prompts, r.samples_per_prompt, r, self.config.seed, step, part)

    def describe(self) -> str:
        """Say nothing: describe_decoding describes it."""
        return ""


def check_engine(config: Config, processes: int, shape: Any) -> str:
    """Check that the configured engine can be used, and return the version of vLLM, "" without it.

    processes: of the run. shape: the model's config. Raises UserError if not.
    """
    if config.rollout.engine != "vllm":
        return ""
    if processes > 1:
        raise UserError(f"rollout.engine must be transformers in a run of several processes; got vllm in {processes}")
    if quantised := quantisation(shape):
        raise UserError(
            f"rollout.engine must be transformers for a quantised model ({quantised}): vLLM gets the policy with its "
            "adapters merged, which quantised weights cannot hold without a loss; got vllm"
        )
    return vllm_version(config.rollout.vllm_python)


@contextmanager
def open_engine(config: Config, policy: Policy, sampler: Policy, trust: bool = False) -> Iterator[RolloutEngine]:
    """Context with the configured engine, which has been checked. vLLM's process ends with it.

    policy: the trained one. sampler: what samples with transformers. trust: run Python code that comes with the model.
    """
    if config.rollout.engine == "vllm":
        with open_vllm(config, policy, trust) as engine:
            yield engine
    else:
        yield TransformersEngine(config, policy, sampler)
