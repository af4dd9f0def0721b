"""The parts of a training step as the benchmarks call them, and the work that each must do at least.

Useful work is that of live rows. With P parameters in the trunk's matrices, T tokens (a prompt counts once for all its
samples, the last token of a response never), N response tokens, hidden size H, vocabulary V, L layers whose heads
together are W wide, and K pairs of a query and a key that it attends to,

    FLOPs = 2 (P T + H V N + 2 L W K) for a forward pass, three times that with its backward pass

(twice where only adapters are trained, because the weights need no gradient).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.machine import device
from benchmarks.workloads.models import EMBEDDED, folder_of, lora_rank
from repo import assets
from repo.common.malloc import keep_freed_memory
from repo.config.schema import Config, ModelConfig, OptimizerConfig, RolloutConfig
from repo.data.prompts import Prompt, batch_at, load_prompts, tokenize_prompts
from repo.data.sequences import Sequences, make_sequences
from repo.models.actor import Actor, Predictions, read_reference
from repo.models.policy import Policy, load_policy, load_reference
from repo.rollout.sample import sample
from repo.scoring.scorers import Scores
from repo.training.batch import Batch, make_batch
from repo.training.update import Updater

PROMPTS, SAMPLES, TOKENS, STEPS = 4, 4, 40, 18  # of the default run
if torch.cuda.is_available():
    PROMPTS, SAMPLES, TOKENS = 8, 8, 512  # enough to keep a GPU busy


@dataclass(frozen=True)
class Step:
    """The parts of a training step.

    prompts: drawn as a run draws them. endless: the policy without stop tokens. layers: the layers whose states the
    embedded scorers read from the reference's forward pass.
    """

    config: Config
    prompts: list[Prompt]
    endless: Policy
    reference: Actor
    updater: Updater
    layers: list[int]

    def rollout(self, count: int) -> Sequences:
        """Sample from the first `count` prompts, never stopping early."""
        return sample(self.endless, self.prompts[:count], SAMPLES, self.config.rollout, 0, 0).sequences

    def generate(self, count: int) -> Tensor:
        """Sample from the same prompts by transformers' generate, which repeats each prompt.

        It samples from the reference, whose weights have the type that decoding computes in.
        """
        ids = [p.token_ids for p in self.prompts[:count] for _ in range(SAMPLES)]
        rows = make_sequences(ids, [[]] * len(ids), self.endless.pad_id)
        width, on = rows.prompt_width, self.endless.device
        return self.reference.lm.model.generate(
            input_ids=rows.input_ids[:, :width].to(on),
            attention_mask=rows.attention_mask[:, :width].to(on, torch.int64),
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
        )

    def read_reference(self, sequences: Sequences, layers: list[int]) -> Tensor:
        """Return the log-probabilities under the reference, (B, R)."""
        budget = self.config.optimizer.micro_batch_tokens
        return read_reference(self.reference, sequences, self.config.rollout.temperature, budget, layers)[0]

    def random_sequences(self, prompts: Sequence[Sequence[int]]) -> Sequences:
        """Return the prompts (token ids) with SAMPLES responses of random tokens each."""
        group = torch.arange(len(prompts)).repeat_interleave(SAMPLES)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.endless.model.vocab_size, (len(group), TOKENS), generator=draw).tolist()
        return make_sequences([list(prompts[i]) for i in group.tolist()], ids, self.endless.pad_id, group)

    def first(self, count: int) -> list[Sequence[int]]:
        """Return the token ids of the first `count` prompts."""
        return [p.token_ids for p in self.prompts[:count]]

    def random_batch(self, sequences: Sequences) -> Batch:
        """Make the batch that an update reads, with random scores."""
        rows = len(sequences.group)
        rewards, costs = torch.randn(2, rows, generator=torch.Generator().manual_seed(1))
        ref_logps = torch.full((rows, TOKENS), -11.0)
        return make_batch(self.config, sequences, Scores(rewards, costs), ref_logps, 1.0, 0.02, Predictions(None, {}))

    def update(self, batch: Batch) -> None:
        """Run forward, backward, clip and AdamW."""
        self.updater.update(batch, STEPS // 2, STEPS)

    def whole(self, batch: Batch) -> None:
        """Run the rollout, the reference with the states that scorers read, and the update."""
        self.read_reference(self.rollout(PROMPTS), self.layers)
        self.update(batch)


@functools.lru_cache(1)
def load_step(model: str) -> Step:
    """Build a step of the embedded model, of a folder, or of a shape with random weights; on CUDA in bf16."""
    keep_freed_memory()
    on, folder, path = device(), assets.ensure(), folder_of(model)
    dtype = "bfloat16" if on.type == "cuda" else "float32"
    settings = ModelConfig(path=path, dtype=dtype, lora_rank=lora_rank(model))
    config = Config(
        model=settings,
        rollout=RolloutConfig(max_response_tokens=TOKENS, samples_per_prompt=SAMPLES, batch_size=2 * PROMPTS * SAMPLES),
        optimizer=OptimizerConfig(lr=1e-7),  # small, so that the work stays the same
    )
    policy = load_policy(path, on, True, settings)
    reference = Actor(load_reference(policy, path, settings))
    room = min(256, policy.model.config.max_position_embeddings - TOKENS)
    tokenized = tokenize_prompts(load_prompts(folder / "prompts" / "train.jsonl"), policy.tokenizer, None, room)
    scorer = folder / "scorers" / "reward" / "scorer.json"
    layer = json.loads(scorer.read_text())["layer"] if model == EMBEDDED else 0
    endless = dataclasses.replace(policy, eos_ids=(-1,))
    prompts = batch_at(tokenized.kept, 0, 2 * PROMPTS, 0)
    return Step(config, prompts, endless, reference, Updater(Actor(policy), config), [layer])


@dataclass(frozen=True)
class Work:
    """Useful work: tokens is T, flops those of a forward pass, both as defined by this module."""

    tokens: int
    flops: float


def useful_work(model: Any, sequences: Sequences) -> Work:
    """Count the work of live rows."""
    shape, prompts, own = model.config, sequences.prompt_lengths, sequences.response_lengths - 1
    first = torch.cat((torch.ones(1, dtype=torch.bool), sequences.group[1:] != sequences.group[:-1]))
    tokens = int(prompts[first].sum() + own.sum())
    pairs = int((prompts * (prompts + 1) // 2)[first].sum() + (own * prompts + own * (own + 1) // 2).sum())
    matrices = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
    head = shape.hidden_size * shape.vocab_size * int(sequences.response_lengths.sum())
    width = shape.num_attention_heads * (
        getattr(shape, "head_dim", 0) or shape.hidden_size // shape.num_attention_heads
    )
    return Work(tokens, 2.0 * (matrices * tokens + head + 2 * shape.num_hidden_layers * width * pairs))


def passes(step: Step) -> int:
    """Return how many forward passes the forward and backward of an update amount to."""
    return 2 if step.config.model.lora_rank else 3
