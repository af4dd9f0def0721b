"""Packing: lay prompts and responses end to end in one row without padding, or pad them for models that need it.

    a group that shares its prompt   [prompt][response 1 without its last token][response 2 without its last token] ...
    any other row                    [prompt, response without its last token]

Up to 7 filler tokens at the end, which no token attends to and no result uses, make the length a multiple of 8, because
matrix products are faster with such numbers of rows.

The state of a prompt's last token predicts the first token of each of its responses. All index arithmetic runs on the
CPU and is followed by one copy to the device, so that the host never waits for a size from the device.
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

MULTIPLE = 8  # the length of a packed row is a multiple of this


@dataclass(frozen=True)
class Packed:
    """The inputs of a forward pass over n responses with N tokens in all, and the indices that lead back to the batch.

    input_ids, position_ids: (1, T) int64 for a packed row, (B, L) for padded rows.
    segments: which tokens of a packed row attend to which; None for padded rows.
    attention_mask: (B, L) bool for padded rows; None for a packed row.
    rows: (N,) int64, for each response token the index of the flattened state that predicts it.
    inputs: (N,) int64, for each response token the index of its own state; None where last tokens are not inputs.
    token_ids: (N,) int64, the response tokens.
    cu_seqlens: (n + 1,) int32, bounds of the responses among the N tokens; a length may be 0.

    These stay on the CPU:
    order: (n,) int64, the batch row of each response.
    places: (N,) int64, the index of each response token in the batch's flattened (B, R) columns.
    width: R, the columns of the batch. lengths: the tokens of each of the n responses.
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
        """Return the device of the inputs, on which the forward pass runs."""
        return self.input_ids.device

    @property
    def tokens(self) -> int:
        """Return the number of positions in the forward pass: T, or B * L with padding."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Packed:
        """Copy the inputs to a device without waiting for the copies; order, places and lengths stay on the CPU."""
        names = ("input_ids", "position_ids", "attention_mask", "rows", "inputs", "token_ids", "cu_seqlens")
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: None if value is None else send(value, device) for name, value in tensors.items()
        }
        segments = None if self.segments is None else self.segments.to(device)
        return dataclasses.replace(self, segments=segments, **moved)


def pack(sequences: Sequences, rows: Tensor, share_prefix: bool, with_last: bool = False) -> Packed:
    """Lay rows (n,) of sequences on the CPU end to end, in the layout that the module's docstring shows.

    A response without tokens takes no room; if no response has a token, one prompt is laid out.

    share_prefix: let rows of one group share one copy of their prompt.
    with_last: make the last token of each response an input too, so that its state can be read.
    """
    rows = _in_order(sequences, rows, share_prefix)
    prompts, responses = sequences.prompt_lengths[rows], sequences.response_lengths[rows]
    group = sequences.group[rows] if share_prefix else torch.arange(len(rows))
    live = responses > 0
    live[0] |= not bool(live.any())
    # the longest response of a group comes first, so it can lay out the prompt if any response of the group has a token
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
    """Sort rows by group and then by falling length, because attention takes adjacent equal lengths in one call."""
    size = sequences.response_lengths[rows] + (0 if share_prefix else sequences.prompt_lengths[rows])
    rows = rows[size.argsort(descending=True, stable=True)]
    return rows[sequences.group[rows].argsort(stable=True)] if share_prefix else rows


def _segments(parts: Tensor, shared: Tensor, prompt_starts: Tensor, prompts: Tensor, filler: int) -> Segments:
    """Make the segments of the laid out parts (n, 2), and one of the filler at the end.

    A prompt that only one response uses forms one segment with it.
    """
    none = torch.zeros_like(prompts)
    merged = torch.stack((parts.sum(1), none), 1)
    lengths = torch.where(shared[:, None], parts, merged).flatten()
    prefix_starts = torch.stack((none, prompt_starts), 1).flatten()
    prefix_lengths = torch.stack((none, torch.where(shared, prompts, 0)), 1).flatten()
    laid, end = lengths > 0, (0, 1 if filler else 0)
    lengths = F.pad(lengths[laid], end, value=filler)
    return make_segments(lengths, F.pad(prefix_starts[laid], end), F.pad(prefix_lengths[laid], end))


def pad(sequences: Sequences, rows: Tensor, with_last: bool = False) -> Packed:
    """Lay rows (n,) out as a left-padded rectangle, one row per response, for models that cannot read packed rows.

    with_last: make the last token of each response an input too, so that its state can be read.
    """
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
    """Gather a batch's values in packed order on packed's device: (B, R) -> (N,) by token, (B,) -> (n,) by response."""
    if values.ndim == 2 and values.shape[1] != packed.width:
        raise ValueError(f"values must have the {packed.width} columns of the batch; got shape {tuple(values.shape)}")
    index = packed.order if values.ndim == 1 else packed.places
    return send(values.reshape(-1)[send(index, values.device)], packed.device)


def unflat(packed: Packed, flat_values: Tensor, out: Tensor) -> None:
    """Write values (N,) by token into a contiguous (B, R) tensor, in place; its other elements stay as they are."""
    out.view(-1)[send(packed.places, out.device)] = flat_values.to(out.device, out.dtype)


def _responses(sequences: Sequences, rows: Tensor) -> dict[str, Any]:
    """Compute the fields of Packed that describe the responses and do not depend on the layout."""
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
