"""Sequences: prompts and responses of a batch as one rectangle of token ids, with masks from lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """Left-padded prompts beside right-padded responses, so that all responses begin in column `prompt_width`.

    input_ids: (B, P + R) int64. prompt_lengths, response_lengths: (B,) int64; a response length counts its
    end-of-sequence token and may be 0. prompt_width: P. Masks come from the lengths, never from the pad id.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    prompt_width: int

    @property
    def attention_mask(self) -> Tensor:
        """(B, P + R) bool: real tokens."""
        column = torch.arange(self.input_ids.shape[1], device=self.input_ids.device) - self.prompt_width
        return (column >= -self.prompt_lengths[:, None]) & (column < self.response_lengths[:, None])

    @property
    def position_ids(self) -> Tensor:
        """(B, P + R) int64: 0 at the first real token of each row."""
        return (self.attention_mask.to(torch.int64).cumsum(1) - 1).clamp_min(0)

    @property
    def response_ids(self) -> Tensor:
        """(B, R) int64."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """(B, R) bool."""
        return self.attention_mask[:, self.prompt_width :]

    def select(self, rows: Tensor) -> Sequences:
        """The given rows, cut to their own longest prompt and response (at least one response column)."""
        prompts, responses = self.prompt_lengths[rows], self.response_lengths[rows]
        width = int(prompts.max())
        stop = self.prompt_width + max(1, int(responses.max()))
        return Sequences(self.input_ids[rows, self.prompt_width - width : stop], prompts, responses, width)

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        return Sequences(
            self.input_ids.to(device),
            self.prompt_lengths.to(device),
            self.response_lengths.to(device),
            self.prompt_width,
        )


def make_sequences(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Sequences:
    """Lay B token lists out in one rectangle; columns are padded with pad_id, which no mask looks at."""
    prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    response_lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
    width = int(prompt_lengths.max())
    ids = torch.full((len(prompts), width + max(1, int(response_lengths.max()))), pad_id, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, width - len(prompt) : width] = torch.tensor(prompt, dtype=torch.int64)
        ids[row, width : width + len(response)] = torch.tensor(response, dtype=torch.int64)
    return Sequences(ids, prompt_lengths, response_lengths, width)


def micro_batches(sequences: Sequences, rows: Tensor, budget: int) -> list[Tensor]:
    """Cut rows (n,) into groups of similar length whose padded rectangle holds at most `budget` tokens.

    A single row may exceed the budget. Every row is in exactly one group.
    """
    total = (sequences.prompt_lengths + sequences.response_lengths)[rows]
    groups: list[list[int]] = []
    prompt_width = response_width = 0
    for row in rows[total.argsort(descending=True, stable=True)].tolist():
        prompt, response = int(sequences.prompt_lengths[row]), int(sequences.response_lengths[row])
        widest = max(prompt_width, prompt), max(response_width, response)
        if groups and (len(groups[-1]) + 1) * sum(widest) <= budget:
            groups[-1].append(row)
            prompt_width, response_width = widest
        else:
            groups.append([row])
            prompt_width, response_width = prompt, response
    return [torch.tensor(group, dtype=torch.int64) for group in groups]
