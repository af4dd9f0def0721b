"""Tree: a prompt and its k responses as one row, so that the prompt is computed once for all of them.

    columns   [pad .. prompt | response 0 | response 1 | ... | response k-1]

A response attends to the prompt and to itself; its positions go on from the end of the prompt. The log-probabilities
are those of k separate sequences, exactly, for models whose every layer attends to the whole context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sequences import Sequences


@dataclass(frozen=True)
class Tree:
    """G rows of W columns. All slots of a row are R wide; slots without a response are masked.

    input_ids, position_ids: (G, W) int64. visible: (G, W, W) bool, which key each query sees.
    columns: (k, R) int64, the column that predicts token t of slot j, the same in every row.
    slots: (B,) int64, index of each response among the G * k slots.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    columns: Tensor
    slots: Tensor


def attends_everywhere(config: Any) -> bool:
    """True when no layer of the model is windowed, chunked or recurrent, which the 4-D mask could not express."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if any(kind != "full_attention" for kind in kinds):
        return False
    return getattr(text, "layer_types", None) is not None or getattr(text, "sliding_window", None) is None


def make_tree(sequences: Sequences) -> Tree:
    """Adjacent rows of one group become one row of the tree."""
    device, width = sequences.input_ids.device, sequences.prompt_width
    _, row = sequences.group.unique_consecutive(return_inverse=True)
    rows = int(row.max()) + 1
    same = row[:, None] == row[None, :]
    slot = same.tril(-1).sum(1)  # how many earlier responses have the same prompt
    slots, length = int(slot.max()) + 1, sequences.response_ids.shape[1]

    first = (slot == 0).nonzero().squeeze(1)
    responses = torch.zeros((rows, slots, length), dtype=torch.int64, device=device)
    responses[row, slot] = sequences.response_ids
    response_mask = torch.zeros((rows, slots, length), dtype=torch.bool, device=device)
    response_mask[row, slot] = sequences.response_mask
    prompt_lengths = sequences.prompt_lengths[first]
    steps = torch.arange(length, device=device)
    prompt_positions = torch.arange(width, device=device) - width + prompt_lengths[:, None]
    response_positions = (prompt_lengths[:, None, None] + steps).expand(rows, slots, length)
    positions = torch.cat((prompt_positions, response_positions.reshape(rows, -1)), 1)
    mask = torch.cat((prompt_positions >= 0, response_mask.reshape(rows, -1)), 1)

    # -1 for the prompt, j for slot j: a query sees the prompt and its own slot, up to its own position
    branch = torch.cat(
        (torch.full((width,), -1, device=device), torch.arange(slots, device=device).repeat_interleave(length))
    )
    related = (branch[None, :] == -1) | (branch[:, None] == branch[None, :])
    causal = positions[:, None, :] <= positions[:, :, None]
    return Tree(
        input_ids=torch.cat((sequences.input_ids[first, :width], responses.reshape(rows, -1)), 1),
        position_ids=positions.clamp_min(0),
        visible=related & causal & mask[:, None, :],
        columns=_predicting_columns(width, slots, length, device),
        slots=row * slots + slot,
    )


def _predicting_columns(width: int, slots: int, length: int, device: torch.device) -> Tensor:
    """(k, R): the prompt's last column for the first token of a response, the token before it for the others."""
    columns = width - 1 + torch.arange(slots * length, device=device).view(slots, length)
    columns[:, 0] = width - 1
    return columns
