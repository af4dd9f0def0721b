"""Batch: the micro-batch whose memory is computed, filled with the longest prompts and responses of a run."""

from __future__ import annotations

import torch

from ..data.packing import Packed, pack
from ..data.packing import pad as pad_rows
from ..data.sequences import make_sequences


def groups_of(tokens: int, prompt: int, response: int, samples: int) -> list[tuple[int, list[int]]]:
    """List the groups of a forward pass of `tokens` tokens as (tokens of the prompt, tokens of each response).

    prompt, response: most tokens of each; the last token of a response is no input. samples: responses of a group.
    The last group is cut so that it fills the pass. A pass holds at least one response.
    """
    size, groups, left = response - 1, list[tuple[int, list[int]]](), max(tokens, prompt + response - 1)
    while left > 1:
        head = prompt if left > prompt else left // 2
        room, lengths = left - head, list[int]()
        while len(lengths) < samples and room > 0 and size > 0:
            lengths.append(min(size, room) + 1)
            room -= min(size, room)
        groups.append((head, lengths or [1]))
        left -= head + sum(length - 1 for length in lengths)
    return groups


def filled(tokens: int, prompt: int, response: int, samples: int) -> Packed:
    """Pack a forward pass of `tokens` tokens; arguments as for groups_of."""
    groups = groups_of(tokens, prompt, response, samples)
    prompts = [[0] * head for head, lengths in groups for _ in lengths]
    responses = [[0] * length for _, lengths in groups for length in lengths]
    group = torch.tensor([i for i, (_, lengths) in enumerate(groups) for _ in lengths])
    return pack(make_sequences(prompts, responses, 0, group), torch.arange(len(prompts)), True)


def padded(tokens: int, prompt: int, response: int) -> Packed:
    """Lay out a padded forward pass of `tokens` tokens, at least one row; arguments as for groups_of."""
    rows = max(1, tokens // (prompt + response - 1))
    sequences = make_sequences([[0] * prompt] * rows, [[0] * response] * rows, 0)
    return pad_rows(sequences, torch.arange(rows))
