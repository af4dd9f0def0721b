"""Tree: a prompt and its k responses as one row, so that the prompt is computed once for all of them.

    columns   [pad .. prompt but its last token | slot 0 | slot 1 | ... | slot k-1]
    slot      [last prompt token, response but its last token]: column t predicts token t of the response

A slot attends to the prompt and to itself; its positions go on from the prompt. The log-probabilities are those of k
separate sequences, exactly, for models whose every layer attends to the whole context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sequences import Sequences


@dataclass(frozen=True)
class Tree:
    """G rows of W = P - 1 + k R columns; slots without a response are masked.

    input_ids, position_ids: (G, W) int64. visible: (G, W, W) bool, which key each query sees.
    slots: k. slot_of: (B,) int64, index of each response among the G * k slots.
    """

    input_ids: Tensor
    position_ids: Tensor
    visible: Tensor
    slots: int
    slot_of: Tensor


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
    slot = (row[:, None] == row[None, :]).tril(-1).sum(1)  # how many earlier responses have the same prompt
    slots, length = int(slot.max()) + 1, sequences.response_ids.shape[1]
    first = (slot == 0).nonzero().squeeze(1)

    slot_ids = torch.zeros((rows, slots, length), dtype=torch.int64, device=device)
    slot_ids[row, slot] = sequences.input_ids[:, width - 1 : -1]
    slot_mask = torch.zeros((rows, slots, length), dtype=torch.bool, device=device)
    slot_mask[row, slot] = sequences.response_mask
    prompt_lengths = sequences.prompt_lengths[first]
    prompt_positions = torch.arange(width - 1, device=device) - width + prompt_lengths[:, None]
    slot_positions = prompt_lengths[:, None, None] - 1 + torch.arange(length, device=device)
    positions = torch.cat((prompt_positions, slot_positions.expand(rows, slots, length).reshape(rows, -1)), 1)
    mask = torch.cat((prompt_positions >= 0, slot_mask.reshape(rows, -1)), 1)

    # -1 for the prompt, j for slot j: a query sees the prompt and its own slot, up to its own position
    branches = torch.arange(slots, device=device).repeat_interleave(length)
    branch = torch.cat((torch.full((width - 1,), -1, device=device), branches))
    related = (branch[None, :] == -1) | (branch[:, None] == branch[None, :])
    causal = positions[:, None, :] <= positions[:, :, None]
    return Tree(
        input_ids=torch.cat((sequences.input_ids[first, : width - 1], slot_ids.reshape(rows, -1)), 1),
        position_ids=positions.clamp_min(0),
        visible=related & causal & mask[:, None, :],
        slots=slots,
        slot_of=row * slots + slot,
    )
