"""Engine: samples the rollout with vLLM in a worker process, which gets the policy's weights before every step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...common.config_fields import config_field, context_of
from ...common.errors import UserError
from ...config.schema import Config
from ...data.prompts import Prompt
from ...data.token_ids import plain_ids
from ...models.layers import uncompiled
from ...models.policy import Policy
from ..sample import Rollout, draw_seeds, make_rollout
from .process import PROGRAM, Worker, worker_command, worker_environment
from .weights import WeightWriter, make_work_folder

BLOCK = 128  # tokens; vLLM's largest block of the KV cache by default, by which the last one of a row is rounded up
TRIED = 8  # tokens of a response of the trial at start
MAX_START_GAP = {"float32": 0.01, "bfloat16": 0.2}  # nats per token between vLLM and the policy, above any rounding's
FIRST = -1  # the step of the weights of the trial at start
UNKNOWN_CACHE = 2**30  # bytes, for models whose config does not tell the size of keys and values


class VllmEngine:
    """Samples from the policy that it was last given by `update`.

    The worker holds a copy of the weights in model.dtype. On CUDA it frees its memory of the GPU after each sampling.
    """

    def __init__(self, config: Config, policy: Policy, worker: Worker, folder: Path, trust: bool = False) -> None:
        """Let the worker load the policy as it is now, and compare its log-probabilities with the policy's.

        The worker first loads the policy with the sign of every weight changed, so that the comparison also shows
        whether vLLM replaces all weights of such a model.

        worker: has just been started. folder: gets the weights on their way. trust: run Python code that comes with
        the model. Raises UserError if vLLM cannot load the model or computes another one.
        """
        self.config, self.policy, self.worker, self.folder = config, policy, worker, folder
        dtype, shape = getattr(torch, config.model.dtype), policy.model.config.get_text_config()
        self.weights, self.size = WeightWriter(policy.model, dtype), weight_bytes(config, policy)
        tokens, rows = sizes_of(config, shape)
        self.cache = cache_bytes(shape, tokens, rows, dtype)
        options = {"dtype": config.model.dtype, "tokens": tokens, "rows": rows, "cache_bytes": self.cache}
        start = partial(worker.ask, "start", trust=trust, **options)
        self.about = self._give(None, lambda path: start(model=str(path)), negated=True)
        self.update(FIRST)
        self.gap = self._measure_gap(min(TRIED, config.rollout.max_response_tokens))
        if not self.gap < MAX_START_GAP[config.model.dtype]:
            raise UserError(
                f"rollout.engine must be transformers for this model: after new weights were put into vLLM its "
                f"log-probabilities differ by {self.gap:.2g} nats per token from the policy's; got vllm"
            )

    def describe(self) -> str:
        """Describe it in one line."""
        return (
            f"rollout: vLLM {self.about['version']} on {self.about['device']} in a process of its own, which holds "
            f"{self.size / 2**30:.2f} GiB of weights ({self.config.model.dtype}) and a KV cache of "
            f"{self.cache / 2**30:.2f} GiB; its log-probabilities are {self.gap:.1e} nats per token from the policy's; "
            "bit-exact resume is off, since vLLM's arithmetic may depend on its batches and version; evaluations sample"
            " with transformers"
        )

    def update(self, step: int) -> None:
        """Give the worker the policy's present weights, from which step `step` samples."""
        self._give(step, lambda path: self.worker.ask("load", folder=str(path)))

    def _give(self, step: int | None, load: Callable[[Path], dict[str, Any]], negated: bool = False) -> dict[str, Any]:
        """Write the weights, let the worker load them, and check that it holds them. Returns the worker's reply."""
        path = self.folder / f"step-{step}"
        try:
            self.weights.write(path, step, negated)
            reply = load(path)
        finally:
            shutil.rmtree(path, ignore_errors=True)
        self.step = step
        return self._checked(reply)

    def _checked(self, reply: dict[str, Any]) -> dict[str, Any]:
        """Return a reply. Raises UserError unless the worker holds the weights that it was last given."""
        if reply["step"] != self.step:
            raise UserError(
                f"rollout.engine: vLLM holds the weights of step {reply['step']} where step {self.step} samples"
            )
        return reply

    def _draw(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], **options: Any) -> dict[str, Any]:
        """Let the worker sample one response to each prompt, a list of token ids; see its `sample`."""
        stop, asked = list(self.policy.eos_ids), [list(ids) for ids in prompts]
        temperature = self.config.rollout.temperature
        reply = self.worker.ask(
            "sample", prompts=asked, seeds=list(seeds), temperature=temperature, stop=stop, **options
        )
        return self._checked(reply)

    @torch.no_grad()
    def _measure_gap(self, limit: int) -> float:
        """Return the mean difference of vLLM's log-probabilities from the policy's, in nats per token.

        limit: largest number of tokens of the responses that are tried.
        """
        policy, temperature = self.policy, self.config.rollout.temperature
        prompts = [row.tolist()[: 3 + i] for i, row in enumerate(plain_ids(policy.model, 4, 6, "vllm probe"))]
        reply = self._draw(prompts, range(len(prompts)), limit=limit, top_p=1.0)
        gaps = []
        autocast = torch.autocast(policy.device.type, policy.autocast, enabled=policy.autocast is not None)
        # not policy.running(), whose layers may round more than the model's own do
        with policy.adapters(), autocast, uncompiled(policy.model):
            for prompt, tokens, logps in zip(prompts, reply["tokens"], reply["logps"], strict=True):
                ids = torch.tensor([prompt + tokens], device=policy.device)
                logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
                expected = (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
                gaps.append((expected.squeeze(-1).cpu() - torch.tensor(logps)).abs())
        return torch.cat(gaps).mean().item()

    def sample(self, prompts: Sequence[Prompt], step: int, part: range | None = None) -> Rollout:
        """Sample the responses of a step; see repo.rollout.sample.sample, whose seeds it takes.

        The log-probabilities are those of the distribution that vLLM drew from.
        """
        r = self.config.rollout
        samples, eos = r.samples_per_prompt, self.policy.eos_ids
        part = range(len(prompts)) if part is None else part
        seeds = draw_seeds(prompts, samples, self.config.seed, step)[part.start * samples : part.stop * samples]
        prompts = prompts[part.start : part.stop]
        repeated = tuple(p for p in prompts for _ in range(samples))
        reply = self._draw([p.token_ids for p in repeated], seeds, limit=r.max_response_tokens, top_p=r.top_p)
        tokens, logps = reply["tokens"], padded(reply["logps"], r.max_response_tokens)
        texts = tuple(self.policy.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        truncated = torch.tensor([not row or row[-1] not in eos for row in tokens])
        group = torch.arange(len(prompts)).repeat_interleave(samples)
        return make_rollout(repeated, group, tokens, texts, logps, truncated, self.policy.pad_id)


@contextmanager
def open_vllm(
    config: Config, policy: Policy, trust: bool = False, program: Sequence[str] | None = None
) -> Iterator[VllmEngine]:
    """Context with the engine, whose process and files are gone after it.

    trust: run Python code that comes with the model. program: command of the worker; None: rollout.vllm_python runs it.
    Raises UserError if vLLM cannot load the policy or computes another model.
    """
    folder = make_work_folder(weight_bytes(config, policy))
    command = worker_command(program or [config.rollout.vllm_python, "-I", str(PROGRAM)], folder)
    try:
        environment = worker_environment(gpu_of(policy.device), torch.get_num_threads())
        with closing(Worker(command, folder, environment)) as worker:
            yield VllmEngine(config, policy, worker, folder, trust)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def weight_bytes(config: Config, policy: Policy) -> int:
    """Compute the size of the policy's weights in model.dtype."""
    return sum(p.numel() for p in policy.model.parameters()) * getattr(torch, config.model.dtype).itemsize


def gpu_of(device: torch.device) -> int | None:
    """Return the number of a GPU among those that this process sees, None for another device."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def padded(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    """Return rows of numbers as one fp32 tensor, zeros on the right."""
    out = torch.zeros(len(rows), width)
    for into, row in zip(out, rows, strict=True):
        into[: len(row)] = torch.tensor(row)
    return out


def sizes_of(config: Config, shape: Any) -> tuple[int, int]:
    """Return the largest number of tokens of a prompt and its response, and of responses at once.

    shape: the model's text config.
    """
    r = config.rollout
    tokens = config.data.max_prompt_tokens + r.max_response_tokens
    return min(tokens, context_of(shape) or tokens), min(r.batch_size, r.prompts_per_step * r.samples_per_prompt)


def cache_bytes(shape: Any, tokens: int, rows: int, dtype: torch.dtype) -> int:
    """Compute the size of the keys and values of `rows` sequences of `tokens` tokens, in bytes.

    shape: the model's text config.
    """
    layers, heads = config_field(shape, "num_hidden_layers", 0), config_field(shape, "num_attention_heads", 0)
    if not layers or not heads:
        return UNKNOWN_CACHE
    columns = config_field(shape, "head_dim", 0) or config_field(shape, "hidden_size", 0) // heads
    per_token = 2 * layers * config_field(shape, "num_key_value_heads", heads) * columns * dtype.itemsize
    return per_token * (-(-tokens // BLOCK) * rows + 1) * BLOCK
