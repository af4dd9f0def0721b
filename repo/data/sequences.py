"""Sequences: the prompts and responses of a batch in one rectangle of token ids, with masks from lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """A batch of left-padded prompts followed by right-padded responses, which all begin in column `prompt_width`.

    input_ids: (B, P + R) int64. prompt_lengths, response_lengths: (B,) int64; a response's length counts its
    end-of-sequence token and may be 0. prompt_width: P. group: (B,) int64; rows of one group have the same prompt.
    Masks are made from the lengths, never from the pad id, which may also occur in a text.
    """

    input_ids: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    prompt_width: int
    group: Tensor

    @property
    def attention_mask(self) -> Tensor:
        """Return (B, P + R) bool, true on tokens that are not padding."""
        column = torch.arange(self.input_ids.shape[1], device=self.input_ids.device) - self.prompt_width
        return (column >= -self.prompt_lengths[:, None]) & (column < self.response_lengths[:, None])

    @property
    def position_ids(self) -> Tensor:
        """Return (B, P + R) int64 positions, which start from 0 at the first token of each row that is not padding."""
        return (self.attention_mask.to(torch.int64).cumsum(1) - 1).clamp_min(0)

    @property
    def response_ids(self) -> Tensor:
        """Return the response columns (B, R) int64."""
        return self.input_ids[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """Return (B, R) bool, true on response tokens."""
        return self.attention_mask[:, self.prompt_width :]

    def token_lists(self) -> list[tuple[list[int], list[int]]]:
        """Return (prompt ids, response ids) of each row, without padding."""
        lengths = zip(self.prompt_lengths.tolist(), self.response_lengths.tolist(), strict=True)
        middle = self.prompt_width
        rows = zip(self.input_ids.tolist(), lengths, strict=True)
        return [(ids[middle - p : middle], ids[middle : middle + r]) for ids, (p, r) in rows]

    def select(self, rows: Tensor) -> Sequences:
        """Return the given rows (n,), cut to their longest prompt and response but to at least one response column."""
        prompts, responses = self.prompt_lengths[rows], self.response_lengths[rows]
        width = int(prompts.max())
        stop = self.prompt_width + max(1, int(responses.max()))
        ids = self.input_ids[rows, self.prompt_width - width : stop]
        return Sequences(ids, prompts, responses, width, self.group[rows])

    def to(self, device: torch.device) -> Sequences:
        """Copy all tensors to a device."""
        lengths = self.prompt_lengths.to(device), self.response_lengths.to(device)
        return Sequences(self.input_ids.to(device), *lengths, self.prompt_width, self.group.to(device))


def make_sequences(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, group: Tensor | None = None
) -> Sequences:
    """Lay B prompts and B responses, lists of token ids, out in one rectangle.

    pad_id: fills the padding; masks never depend on it. group: (B,) int64, equal only for rows with the same prompt;
    None makes every row a group of its own.
    """
    prompt_lengths = torch.tensor([len(p) for p in prompts], dtype=torch.int64)
    response_lengths = torch.tensor([len(r) for r in responses], dtype=torch.int64)
    width = int(prompt_lengths.max())
    ids = torch.full((len(prompts), width + max(1, int(response_lengths.max()))), pad_id, dtype=torch.int64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, width - len(prompt) : width] = torch.tensor(prompt, dtype=torch.int64)
        ids[row, width : width + len(response)] = torch.tensor(response, dtype=torch.int64)
    return Sequences(
        ids, prompt_lengths, response_lengths, width, torch.arange(len(ids)) if group is None else group.clone()
    )
