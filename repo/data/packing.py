"""Packing: responses and their prompts laid end to end in one row without padding, and their split by token budget.

    a group that shares its prompt   [prompt][response 1 but its last token][response 2 but its last token] ...
    any other row                    [prompt, response but its last token]

At the end come up to 7 tokens that nobody reads or attends to, because matrix products like numbers of rows that are
divisible by 8.

The state of a prompt's last token predicts the first token of each of its responses. Everything here is index
arithmetic on the CPU; one copy to the device follows, and no size is ever read back from it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .segments import Segments, bounds, make_segments, ranges, send
from .sequences import Sequences

MULTIPLE = 8


@dataclass(frozen=True)
class Packed:
    """What one forward reads for n responses of N tokens in all.

    input_ids, position_ids: (1, T) int64, or (B, L) of padded rows. segments: who attends to whom in the packed row.
    attention_mask: (B, L) bool of padded rows; exactly one of the two is given. rows: (N,) int64, which of the
    flattened states predicts each response token. inputs: (N,) int64, which is the state of each response token,
    None where the last ones are not read. token_ids: (N,) int64, the response tokens. cu_seqlens: (n + 1,) int32,
    bounds of the responses among the N, whose lengths may be 0.

    On the CPU whatever the device: order: (n,) int64, the batch row of each response; places: (N,) int64, its token's
    place in the batch's flattened (B, R), with width R; lengths: of the n responses; tokens: T, or B * L with padding.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments | None
    attention_mask: Tensor | None
    rows: Tensor
    inputs: Tensor | None
    token_ids: Tensor
    cu_seqlens: Tensor
    order: Tensor
    places: Tensor
    width: int
    lengths: tuple[int, ...]

    @property
    def device(self) -> torch.device:
        """Where the forward runs."""
        return self.input_ids.device

    @property
    def tokens(self) -> int:
        """Positions of the forward, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Packed:
        """The same on a device; the copies do not wait."""
        names = ("input_ids", "position_ids", "attention_mask", "rows", "inputs", "token_ids", "cu_seqlens")
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: None if value is None else send(value, device) for name, value in tensors.items()
        }
        segments = None if self.segments is None else self.segments.to(device)
        return dataclasses.replace(self, segments=segments, **moved)


def pack(sequences: Sequences, rows: Tensor, share_prefix: bool, with_last: bool = False) -> Packed:
    """Lay out rows (n,) of sequences that are on the CPU, as the module says.

    share_prefix: rows of one group share one copy of their prompt. with_last: the last token of each response is an
    input too, for readers of its state. A response of no tokens takes no room; where all are, one prompt is laid out.
    """
    rows = _in_order(sequences, rows, share_prefix)
    prompts, responses = sequences.prompt_lengths[rows], sequences.response_lengths[rows]
    group = sequences.group[rows] if share_prefix else torch.arange(len(rows))
    live = responses > 0
    live[0] |= not bool(live.any())
    # the longest response of a group comes first, so that it leads if any of the group does
    leads = live & torch.cat((torch.ones(1, dtype=torch.bool), group[1:] != group[:-1]))
    leader = torch.where(leads, torch.arange(len(rows)), 0).cummax(0).values
    own = torch.where(live, responses - (0 if with_last else 1), 0).clamp_min(0)
    parts = torch.stack((torch.where(leads, prompts, 0), own), 1)  # (n, 2): tokens of the prompt, of the response
    starts = (parts.flatten().cumsum(0) - parts.flatten()).view(-1, 2)
    prompt_starts, response_starts = starts[leader, 0], starts[:, 1]

    column = rows * sequences.input_ids.shape[1] + sequences.prompt_width
    source = ranges(torch.stack((column - prompts, column), 1).flatten(), parts.flatten())
    positions = ranges(torch.stack((torch.zeros_like(prompts), prompts), 1).flatten(), parts.flatten())
    predicts = ranges(response_starts - 1, responses)
    first = (responses.cumsum(0) - responses)[responses > 0]
    predicts[first] = (prompt_starts + prompts - 1)[responses > 0]
    shared = (torch.bincount(leader[live], minlength=len(rows)) > 1)[leader]
    filler = -len(source) % MULTIPLE
    return Packed(
        input_ids=sequences.input_ids.reshape(-1)[F.pad(source, (0, filler))][None],
        position_ids=F.pad(positions, (0, filler))[None],
        segments=_segments(parts, shared, prompt_starts, prompts, filler),
        attention_mask=None,
        rows=predicts,
        inputs=ranges(response_starts, responses) if with_last else None,
        **_responses(sequences, rows),
    )


def _in_order(sequences: Sequences, rows: Tensor, share_prefix: bool) -> Tensor:
    """Groups together and longest first, because adjacent sequences of equal length are attended to in one call."""
    size = sequences.response_lengths[rows] + (0 if share_prefix else sequences.prompt_lengths[rows])
    rows = rows[size.argsort(descending=True, stable=True)]
    return rows[sequences.group[rows].argsort(stable=True)] if share_prefix else rows


def _segments(parts: Tensor, shared: Tensor, prompt_starts: Tensor, prompts: Tensor, filler: int) -> Segments:
    """Segments of the laid out parts (n, 2), and of the filler at the end; prompt and response are one where the
    prompt is not shared."""
    none = torch.zeros_like(prompts)
    merged = torch.stack((parts.sum(1), none), 1)
    lengths = torch.where(shared[:, None], parts, merged).flatten()
    prefix_starts = torch.stack((none, prompt_starts), 1).flatten()
    prefix_lengths = torch.stack((none, torch.where(shared, prompts, 0)), 1).flatten()
    laid, end = lengths > 0, (0, 1 if filler else 0)
    lengths = F.pad(lengths[laid], end, value=filler)
    return make_segments(lengths, F.pad(prefix_starts[laid], end), F.pad(prefix_lengths[laid], end))


def pad(sequences: Sequences, rows: Tensor, with_last: bool = False) -> Packed:
    """The same for a model that cannot read packed rows: rows (n,) as a left-padded rectangle, one row per response."""
    part = sequences.select(rows)
    stop = None if with_last else -1
    ids = part.input_ids[:, :stop]
    states = ranges(torch.arange(len(rows)) * ids.shape[1] + part.prompt_width, part.response_lengths)
    return Packed(
        input_ids=ids,
        position_ids=part.position_ids[:, :stop],
        segments=None,
        attention_mask=part.attention_mask[:, :stop],
        rows=states - 1,
        inputs=states if with_last else None,
        **_responses(sequences, rows),
    )


def flat(packed: Packed, values: Tensor) -> Tensor:
    """A batch's values in packed order, on packed's device: (B, R) -> (N,) by token, (B,) -> (n,) by response."""
    if values.ndim == 2 and values.shape[1] != packed.width:
        raise ValueError(f"values: got {tuple(values.shape)}, needs the {packed.width} columns of the batch")
    index = packed.order if values.ndim == 1 else packed.places
    return send(values.reshape(-1)[send(index, values.device)], packed.device)


def unflat(packed: Packed, flat_values: Tensor, out: Tensor) -> None:
    """Write (N,) values by token into a contiguous (B, R) tensor, whose other places stay as they are."""
    out.view(-1)[send(packed.places, out.device)] = flat_values.to(out.device, out.dtype)


def _responses(sequences: Sequences, rows: Tensor) -> dict[str, Any]:
    """The fields that describe the responses, whatever the layout."""
    lengths, width = sequences.response_lengths[rows], sequences.response_ids.shape[1]
    columns = rows * sequences.input_ids.shape[1] + sequences.prompt_width
    return {
        "token_ids": sequences.input_ids.reshape(-1)[ranges(columns, lengths)],
        "cu_seqlens": bounds(lengths),
        "order": rows,
        "places": ranges(rows * width, lengths),
        "width": width,
        "lengths": tuple(lengths.tolist()),
    }
