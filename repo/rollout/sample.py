"""Rollout: sample responses from the policy, each from its own seed, so that batching never changes a sample.

The prefix of a prompt is computed once for all its samples; weights are packed or cast once per rollout; the cache and
the decode step are decoding.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repo_kernels.layers.packed_linear import packed_linears

from ..common.seeds import generator
from ..config.schema import RolloutConfig
from ..data.prompts import Prompt
from ..data.sequences import Sequences, make_sequences
from ..models.layers import uncompiled
from ..models.policy import Policy
from .kv_cache import Decoder, make_decoder

WORTH_SHRINKING = 0.75  # a batch is cut to its unfinished rows once they are this share of it: the cache is copied


@dataclass(frozen=True)
class Rollout:
    """B responses. prompts: of each; group: (B,) int64, which of the step's prompts; texts: decoded responses; logps:
    (B, R) fp32 of the sampled tokens in the distribution they were drawn from, 0 beyond each response."""

    prompts: tuple[Prompt, ...]
    group: Tensor
    sequences: Sequences
    texts: tuple[str, ...]
    logps: Tensor

    @property
    def tokens(self) -> int:
        """Response tokens in all."""
        return int(self.sequences.response_lengths.sum())


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Inverse-CDF sampling: one uniform number in [0, 1) decides each token. logits: (B, V); uniforms: (B,) -> tokens
    (B,) and their log-probabilities (B,) fp32 in the distribution that was drawn from."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    if top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(outside, 0.0))
    cdf = probs.cumsum(-1, dtype=torch.float64)
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    tokens = torch.searchsorted(cdf, threshold, right=True).clamp_max(logits.shape[-1] - 1)
    return tokens.squeeze(-1), (probs.gather(-1, tokens) / cdf[:, -1:]).log().float().squeeze(-1)


def draw_uniforms(prompts: Sequence[Prompt], samples: int, length: int, seed: int, step: int | str) -> Tensor:
    """(prompts * samples, length) fp64; row i depends on (seed, step, prompt id, sample) only.

    The samples of a prompt that comes again in the step are numbered onward.
    """
    numbers: Counter[str] = Counter()
    rows = []
    for prompt in prompts:
        for _ in range(samples):
            number = numbers[prompt.id]
            rows.append(torch.rand(length, generator=generator(seed, step, prompt.id, number), dtype=torch.float64))
            numbers[prompt.id] += 1
    return torch.stack(rows)


@torch.no_grad()
def decode(
    policy: Policy, decoder: Decoder, prompts: Sequence[Prompt], samples: int, uniforms: Tensor, config: RolloutConfig
) -> tuple[list[list[int]], Tensor]:
    """Token lists of len(prompts) * samples responses, each ending with an end-of-sequence token or at the limit, and
    the log-probabilities (prompts * samples, limit) of their tokens."""
    device, limit = policy.device, uniforms.shape[1]
    prefix = make_sequences([p.token_ids for p in prompts], [[]] * len(prompts), policy.pad_id).to(device)
    logits = decoder.start(prefix, samples)
    uniforms = uniforms.to(device)
    stop = torch.tensor(policy.eos_ids, device=device)
    rows = torch.arange(len(uniforms), device=device)  # those still decoded
    done = torch.zeros(len(rows), dtype=torch.bool, device=device)
    found = torch.full(uniforms.shape, policy.eos_ids[0], device=device)
    logps = torch.zeros(uniforms.shape, device=device)
    check_every = 1 if device.type == "cpu" else 16  # asking whether all are done waits for the device
    for t in range(limit):
        tokens, said = sample_tokens(logits, uniforms[rows, t], config.temperature, config.top_p)
        found[rows, t], logps[rows, t] = tokens, said
        done |= torch.isin(tokens, stop)
        if t + 1 == limit:
            break
        if (t + 1) % check_every == 0:
            going = int((~done).sum())
            if going == 0:
                break
            kept = (~done).nonzero().squeeze(1) if going <= WORTH_SHRINKING * len(rows) else None
            if kept is not None and decoder.keep(kept):
                rows, tokens, done = rows[kept], tokens[kept], done[kept]
        logits = decoder.step(tokens)
    return [_until_stop(row, policy.eos_ids) for row in found.tolist()], logps.cpu()


def _until_stop(tokens: list[int], eos_ids: tuple[int, ...]) -> list[int]:
    """Tokens up to and including the first end-of-sequence token."""
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
    """`samples` responses of each prompt, prompt by prompt, in batches of at most config.batch_size responses.

    part: which of the prompts, adjacent ones; the samples are those that all prompts would have got together.
    """
    part = range(len(prompts)) if part is None else part
    uniforms = draw_uniforms(prompts, samples, config.max_response_tokens, seed, step)
    uniforms = uniforms[part.start * samples : part.stop * samples]
    prompts = prompts[part.start : part.stop]
    per_batch = max(1, config.batch_size // samples)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    responses: list[list[int]] = [[] for _ in range(len(prompts) * samples)]
    logps = torch.zeros(uniforms.shape)
    rows_at_once = min(per_batch, len(prompts)) * samples
    with policy.running(), uncompiled(policy.model), packed_linears(policy.model, rows_at_once):
        decoder = make_decoder(policy, rows_at_once, len(prompts[order[-1]].token_ids), config.max_response_tokens)
        for start in range(0, len(order), per_batch):
            chosen = order[start : start + per_batch]
            rows = [i * samples + s for i in chosen for s in range(samples)]
            decoded, logps[rows] = decode(
                policy, decoder, [prompts[i] for i in chosen], samples, uniforms[rows], config
            )
            for row, tokens in zip(rows, decoded, strict=True):
                responses[row] = tokens
    repeated = tuple(p for p in prompts for _ in range(samples))
    group = torch.arange(len(prompts)).repeat_interleave(samples)
    texts = tuple(policy.tokenizer.batch_decode(responses, skip_special_tokens=True))
    return make_rollout(repeated, group, responses, texts, logps, policy.pad_id)


def make_rollout(
    prompts: tuple[Prompt, ...],
    group: Tensor,
    responses: Sequence[Sequence[int]],
    texts: tuple[str, ...],
    logps: Tensor,
    pad_id: int,
) -> Rollout:
    """From B token lists and log-probabilities (B, limit)."""
    sequences = make_sequences([p.token_ids for p in prompts], responses, pad_id, group)
    mask = sequences.response_mask
    return Rollout(prompts, group, sequences, texts, torch.where(mask, logps[:, : mask.shape[1]], 0.0))
