"""Sampling: responses from the policy, each drawn from its own seed, so that batching never changes a sample.

A prompt is computed once for all its samples, and weights are packed or cast once per rollout. The cache and the decode
step are in kv_cache.py and graphs/, their choice in decoding.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repo_kernels.layers.sampling import sample_tokens

from ..common.seeds import seed_from
from ..config.schema import RolloutConfig
from ..data.prompts import Prompt
from ..data.sequences import Sequences, make_sequences
from ..models.layers import uncompiled
from ..models.policy import Policy
from .decoding import choose_decoding, running_decoder
from .kv_cache import Decoder

WORTH_SHRINKING = 0.75  # drop finished rows once at most this share of the batch is left, because that copies the cache


@dataclass(frozen=True)
class Rollout:
    """B sampled responses.

    prompts: the prompt of each response. group: (B,) int64, the number of its prompt in the batch. sequences: their
    token ids. texts: decoded responses, without special tokens. logps: (B, R) fp32 log-probabilities in nats of the
    sampled tokens in the distribution that they were drawn from, 0 after each response. truncated: (B,) bool, true for
    responses that ended at the limit of tokens without a stop token.
    """

    prompts: tuple[Prompt, ...]
    group: Tensor
    sequences: Sequences
    texts: tuple[str, ...]
    logps: Tensor
    truncated: Tensor

    @property
    def tokens(self) -> int:
        """Return the number of response tokens in all."""
        return int(self.sequences.response_lengths.sum())


def draw_uniforms(prompts: Sequence[Prompt], samples: int, length: int, seed: int, step: int | str) -> Tensor:
    """Draw the uniform numbers that decide all tokens: (prompts * samples, length) fp64 in [0, 1)."""
    generators = [torch.Generator().manual_seed(s) for s in draw_seeds(prompts, samples, seed, step)]
    return torch.stack([torch.rand(length, generator=g, dtype=torch.float64) for g in generators])


def draw_seeds(prompts: Sequence[Prompt], samples: int, seed: int, step: int | str) -> list[int]:
    """Derive the seed of each of prompts * samples responses: 63 bits.

    It depends on seed, step, prompt id and the number of the sample alone. If a prompt occurs twice in a step, the
    numbering of its samples continues.
    """
    numbers: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        for _ in range(samples):
            seeds.append(seed_from(seed, step, prompt.id, numbers[prompt.id]))
            numbers[prompt.id] += 1
    return seeds


@torch.no_grad()
def decode(
    policy: Policy, by: Decoder, prompts: Sequence[Prompt], samples: int, uniforms: Tensor, config: RolloutConfig
) -> tuple[list[list[int]], Tensor]:
    """Decode one batch of B = len(prompts) * samples responses.

    uniforms: (B, limit), which decide the tokens and give the limit of tokens.
    Returns B token lists, each ending with an end-of-sequence token or at the limit, and the log-probabilities
    (B, limit) fp32 of their tokens on the CPU; values after the end of a response have no meaning.
    """
    device, limit = policy.device, uniforms.shape[1]
    prefix = make_sequences([p.token_ids for p in prompts], [[]] * len(prompts), policy.pad_id).to(device)
    logits = by.start(prefix, samples)
    uniforms = uniforms.to(device)
    stop = torch.tensor(policy.eos_ids, device=device)
    rows = torch.arange(len(uniforms), device=device)  # rows that are still in the decoder
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    sampled = torch.full(uniforms.shape, policy.eos_ids[0], device=device)
    logps = torch.zeros(uniforms.shape, device=device)
    check_every = 1 if device.type == "cpu" else 16  # steps; to check whether all are done, the host waits for a GPU
    for t in range(limit):
        tokens, token_logps = sample_tokens(logits, uniforms[rows, t], config.temperature, config.top_p)
        sampled[rows, t], logps[rows, t] = tokens, token_logps
        done |= torch.isin(tokens, stop)
        if t + 1 == limit:
            break
        if (t + 1) % check_every == 0:
            going = int((~done).sum())
            if going == 0:
                break
            kept = (~done).nonzero().squeeze(1) if going <= WORTH_SHRINKING * len(rows) else None
            if kept is not None and by.keep(kept):
                rows, tokens, done = rows[kept], tokens[kept], done[kept]
        logits = by.step(tokens)
    return [_until_stop(row, policy.eos_ids) for row in sampled.tolist()], logps.cpu()


def _until_stop(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """Cut tokens after the first end-of-sequence token, if there is one."""
    for i, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: i + 1]
    return tokens


def sample(
    policy: Policy,
    prompts: Sequence[Prompt],
    samples: int,
    config: RolloutConfig,
    seed: int,
    step: int | str,
    part: range | None = None,
) -> Rollout:
    """Sample `samples` responses to each prompt, in the order of the prompts.

    They are decoded in batches of at most config.batch_size responses, or of one prompt's if `samples` is larger.

    seed, step: decide the samples, together with each prompt's id. part: indices of the prompts to answer, adjacent
    ones; None: all. A part gets the same samples as in a call for all prompts.
    """
    part = range(len(prompts)) if part is None else part
    uniforms = draw_uniforms(prompts, samples, config.max_response_tokens, seed, step)
    uniforms = uniforms[part.start * samples : part.stop * samples]
    return sample_by(policy, prompts[part.start : part.stop], samples, config, uniforms)


def sample_by(
    policy: Policy, prompts: Sequence[Prompt], samples: int, config: RolloutConfig, uniforms: Tensor
) -> Rollout:
    """Sample `samples` responses to each of P >= 1 prompts by given random numbers; see sample.

    uniforms: (P * samples, config.max_response_tokens) fp64 in [0, 1), as draw_uniforms draws them.
    """
    per_batch = max(1, config.batch_size // samples) if choose_decoding(policy).batches else 1
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    responses: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    logps = torch.zeros(uniforms.shape)
    rows_at_once = min(per_batch, len(prompts)) * samples
    width, limit = len(prompts[order[-1]].token_ids), config.max_response_tokens
    with policy.exact().running(), uncompiled(policy.model), running_decoder(policy, rows_at_once, width, limit) as by:
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            rows = [i * samples + s for i in chosen for s in range(samples)]
            asked = [prompts[i] for i in chosen]
            decoded, logps[rows] = decode(policy, by, asked, samples, uniforms[rows], config)
            for row, tokens in zip(rows, decoded, strict=True):
                responses[row] = tokens
    repeated = tuple(p for p in prompts for _ in range(samples))
    group = torch.arange(len(prompts)).repeat_interleave(samples)
    texts = tuple(policy.tokenizer.batch_decode(responses, skip_special_tokens=True))
    truncated = torch.tensor([not tokens or tokens[-1] not in policy.eos_ids for tokens in responses])
    return make_rollout(repeated, group, responses, texts, logps, truncated, policy.pad_id)


def make_rollout(
    prompts: tuple[Prompt, ...],
    group: Tensor,
    responses: Sequence[Sequence[int]],
    texts: tuple[str, ...],
    logps: Tensor,
    truncated: Tensor,
    pad_id: int,
) -> Rollout:
    """Make a Rollout of B responses.

    prompts, texts: one per response. group: (B,) int64. responses: token lists. logps: (B, limit), of which values
    after the end of a response are ignored. truncated: (B,) bool. pad_id: fills the padding.
    """
    sequences = make_sequences([p.token_ids for p in prompts], responses, pad_id, group)
    mask = sequences.response_mask
    logps = torch.where(mask, logps[:, : mask.shape[1]], 0.0)
    return Rollout(prompts, group, sequences, texts, logps, truncated)
