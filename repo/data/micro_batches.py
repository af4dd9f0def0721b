"""Micro-batches: divide the rows of a batch among processes, and into forward passes within a token budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import MULTIPLE
from .sequences import Sequences


def divide(sequences: Sequences, rows: Tensor, processes: int, whole: bool = False) -> list[Tensor]:
    """Divide rows (n,) of a batch among processes so that each gets about as many tokens.

    Prompt groups are assigned from the largest down, each to the process with the fewest tokens so far. A group stays
    together, so that its prompt is computed once, unless there are fewer prompts than processes and not `whole`.
    Returns one sorted int64 tensor of rows per process.
    """
    groups: dict[int, list[int]] = {}
    alone = not whole and len(sequences.group[rows].unique()) < processes
    for row in rows.tolist():
        groups.setdefault(row if alone else int(sequences.group[row]), []).append(row)
    prompts, responses = sequences.prompt_lengths.tolist(), sequences.response_lengths.tolist()
    sizes = {g: prompts[members[0]] + sum(responses[row] for row in members) for g, members in groups.items()}
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [0] * processes
    for group in sorted(groups, key=lambda g: (-sizes[g], g)):
        rank = loads.index(min(loads))
        shares[rank] += groups[group]
        loads[rank] += sizes[group]
    return [torch.tensor(sorted(share), dtype=torch.int64) for share in shares]


def micro_batches(
    sequences: Sequences,
    rows: Tensor,
    budget: int,
    share_prefix: bool,
    padded: bool = False,
    with_last: bool = False,
    whole: bool = False,
) -> list[Tensor]:
    """Cut rows (n,) of a batch into sets for forward passes of at most `budget` tokens, of about equal work.

    There are as few sets as first-fit decreasing finds. A prompt group that fits stays together; a larger one is cut
    into pieces, each with its own copy of the prompt. A row that exceeds the budget by itself gets a set of its own.

    Args:
        budget: tokens of one forward pass, counted in the layout of `pack` with its filler, or of `pad` with padding.
        share_prefix, with_last: as given to `pack`. padded: count tokens for `pad` instead.
        whole: keep every prompt group together, and give one that exceeds the budget a set of its own.

    Returns:
        int64 tensors of rows in ascending order; every row is in exactly one of them.
    """
    if not len(rows):
        return []
    prompts, responses = sequences.prompt_lengths[rows].tolist(), sequences.response_lengths[rows].tolist()
    groups = sequences.group[rows].tolist() if share_prefix else rows.tolist()
    if padded:
        inputs = [max(1, r) - (not with_last) for r in responses]
        return _padded_batches(rows.tolist(), prompts, inputs, groups if whole else rows.tolist(), budget)
    budget -= budget % MULTIPLE
    prompt_of = dict(zip(groups, prompts, strict=True))
    members: dict[int, list[_Item]] = {}
    empty: list[int] = []  # rows without a response take no tokens and go into the last set
    for row, group, length in zip(rows.tolist(), groups, responses, strict=True):
        if length:
            members.setdefault(group, []).append((length - (not with_last), [row]))
        else:
            empty.append(row)
    pieces = []
    for group, items in members.items():
        if whole:
            pieces.append((prompt_of[group] + sum(tokens for tokens, _ in items), _rows(items)))
            continue
        for piece in _balanced(_first_fit(items, budget - prompt_of[group]), budget - prompt_of[group]):
            pieces.append((prompt_of[group] + sum(tokens for tokens, _ in piece), _rows(piece)))
    sets = [_rows(piece) for piece in _balanced(_first_fit(pieces, budget), budget)] or [[]]
    sets[-1] += empty
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in sets]


_Item = tuple[int, list[int]]  # number of tokens, and the rows that take them


def _rows(items: list[_Item]) -> list[int]:
    """List the rows of all items."""
    return [row for _, rows in items for row in rows]


def _first_fit(items: list[_Item], capacity: int) -> list[list[_Item]]:
    """Put items into bins of `capacity` tokens by first-fit decreasing; a larger item gets a bin of its own."""
    bins: list[list[_Item]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: -item[0]):
        place = next((i for i, space in enumerate(room) if item[0] <= space), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(capacity)
        bins[place].append(item)
        room[place] -= item[0]
    return bins


def _balanced(bins: list[list[_Item]], capacity: int) -> list[list[_Item]]:
    """Spread the items of bins over as many bins so that none holds much less than the others.

    First-fit fills its first bins and may leave a few tokens to the last, which a device computes badly. From the
    largest item down, each goes to the emptiest bin. Returns `bins` themselves if that exceeds the capacity, or holds
    the same in its fullest bin. Tokens stand for the work: attention over L keys adds about L / 12H to a layer of
    hidden width H, a few percent at the lengths of responses.
    """
    if len(bins) < 2:
        return bins
    spread: list[list[_Item]] = [[] for _ in bins]
    loads = [0] * len(bins)
    for item in sorted((item for part in bins for item in part), key=lambda item: -item[0]):
        place = loads.index(min(loads))
        spread[place].append(item)
        loads[place] += item[0]
    fullest = max(sum(tokens for tokens, _ in part) for part in bins)
    return spread if max(loads) <= capacity and max(loads) < fullest else bins


def _padded_batches(
    rows: list[int], prompts: list[int], responses: list[int], groups: list[int], budget: int
) -> list[Tensor]:
    """Cut rows into sets of similar lengths whose padded rectangles take at most `budget` tokens.

    The rectangle of a set is as wide as its longest prompt and its longest response together. Rows of one group stay
    together.
    """
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    sizes = {g: (max(prompts[i] for i in m), max(responses[i] for i in m)) for g, m in members.items()}
    sets: list[list[int]] = []
    prompt = response = 0
    for group in sorted(members, key=lambda g: (-sizes[g][0], -sizes[g][1])):
        together = [rows[i] for i in members[group]]
        wide = max(prompt, sizes[group][0]), max(response, sizes[group][1])
        if sets and (len(sets[-1]) + len(together)) * sum(wide) <= budget:
            sets[-1] += together
            prompt, response = wide
        else:
            sets.append(together)
            prompt, response = sizes[group]
    return [torch.tensor(sorted(part), dtype=torch.int64) for part in sets]
