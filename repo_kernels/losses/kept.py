"""Kept-token sets: the loss of a rollout that was sampled from the top-k or top-p tokens alone.

The policy is the softmax over the kept tokens of each row. Its logits are a matrix (N, K): those of the kept ids, and
-inf where a row has fewer than K. A loss of these logits is the loss over the set.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..backends.codes import IGNORED
from ..backends.eager.dense import row_sequences
from ..backends.interface import Loss, compute_dtype
from ..checks import ID_DTYPES, describe, is_at_hand
from ..tensor_kinds import check_kind, check_memory, is_transformed, operate
from .composite.losses import Head
from .composite.rows import masked_logits
from .heads.kept import kept_products
from .heads.lora import HeadTensors
from .heads.operators import gradients_wanted


@dataclass(frozen=True, eq=False)
class KeptSets:
    """The kept ids of each row, checked.

    Args:
        index: (N, K) int64, ids in [0, V), or -1 where there is none and in dead rows.
        ids: (N,) int64, the place of the row's token in its set; IGNORED in dead rows.
    """

    index: Tensor
    ids: Tensor

    @staticmethod
    def of(kept: Tensor, ids: Tensor, source: Tensor, vocabulary: int) -> KeptSets:
        """Check the sets and find the tokens in them. Values are checked on the CPU, where that waits for nothing.

        Args:
            kept: as the caller gave it. ids: (N,) int64 tokens, IGNORED in dead rows. source: logits or hidden states.

        Raises:
            TypeError, ValueError, IndexError: kept has a wrong dtype, shape, device or value.
        """
        leading = tuple(source.shape[:-1])
        if isinstance(kept, Tensor):
            check_kind("kept", kept, source)
        if not isinstance(kept, Tensor) or kept.dtype not in ID_DTYPES:
            raise TypeError(f"kept must be a tensor of int64 or int32, shape {(*leading, 'K')}; got {describe(kept)}")
        if tuple(kept.shape[:-1]) != leading or kept.ndim != source.ndim or not kept.shape[-1]:
            raise ValueError(f"kept must have shape {(*leading, 'K')} with K >= 1; got {describe(kept)}")
        if kept.device != source.device:
            raise ValueError(f"kept must be on {source.device} with the logits; got {describe(kept)}")
        check_memory(kept=kept)
        live = ids != IGNORED
        index = torch.where(live[:, None], kept.reshape(len(ids), kept.shape[-1]).to(torch.int64), -1)
        outside = (index < -1) | (index >= vocabulary)
        found = (index == ids[:, None]) & (index >= 0)
        if is_at_hand(kept):
            _check_values(index, outside, ids, live & ~found.any(-1), vocabulary)
        # a place outside of the set is an id outside of the vocabulary: it is refused, or NaN, as that is
        place = torch.where(found.any(-1) & ~outside.any(-1), found.int().argmax(-1), kept.shape[-1])
        return KeptSets(torch.where(outside, -1, index), torch.where(live, place, IGNORED))

    def of_logits(self, logits: Tensor, softcap: float) -> Tensor:
        """Take the logits (..., V) of the kept ids: (..., K) of the compute dtype, capped, -inf where there is none."""
        values = logits.reshape(-1, logits.shape[-1]).gather(-1, self.index.clamp_min(0)).to(compute_dtype(logits))
        return self._capped(values, softcap).view(*logits.shape[:-1], self.index.shape[-1])

    def of_head(self, head: Head, softcap: float, chunk_tokens: int | None, chunk_bytes: int | None) -> Tensor:
        """Compute `of_logits` of hidden states (..., H) and a head, without the logits of other tokens."""
        hidden, weight, bias, lora_a, lora_b, scaling = HeadTensors(*head)
        result, live, chunk = compute_dtype(hidden), self.ids != IGNORED, (chunk_tokens, chunk_bytes)
        with torch.autocast(hidden.device.type, enabled=False):
            values = self._products(hidden.reshape(-1, hidden.shape[-1]), weight, bias, *chunk)
            if lora_a is not None and lora_b is not None and scaling is not None:
                inner = scaling * (masked_logits(hidden, live, result) @ lora_a.to(result).t())
                values = values + self._products(inner, lora_b, None, *chunk)
        return self._capped(values, softcap).view(*hidden.shape[:-1], self.index.shape[-1])

    def _products(self, rows: Tensor, weight: Tensor, bias: Tensor | None, *chunk: int | None) -> Tensor:
        """Compute the products (N, K) of rows (N, H) with the kept rows of a weight (V, H), and add the bias."""
        if is_transformed():
            index, result = self.index.clamp_min(0), compute_dtype(rows)
            inside = masked_logits(rows, self.ids != IGNORED, result)
            products = (weight[index].to(result) @ inside[:, :, None])[..., 0]
            return products if bias is None else products + bias[index].to(result)
        check_memory(hidden=rows, weight=weight, bias=bias)
        named = {"hidden": rows, "weight": weight, "bias": bias}
        wanted = gradients_wanted(HeadTensors(rows, weight, bias))[: len(named)]
        values: Tensor = operate(kept_products, named, rows, weight, bias, self.index, wanted, *chunk)
        return values

    def loss(self, loss: Loss) -> Loss:
        """Return the loss over the sets: its tokens are places in them, and its logits are capped already."""
        arguments = replace(loss.arguments, token_ids=self.ids.view(loss.arguments.leading))
        return replace(loss, arguments=arguments, softcap=0.0)

    def _capped(self, values: Tensor, softcap: float) -> Tensor:
        """Cap before -inf comes in, which the cap would make finite, and after NaN of dead rows has gone out."""
        absent = self.index < 0
        if softcap:
            values = softcap * torch.tanh(values.masked_fill(absent, 0.0) / softcap)
        return values.masked_fill(absent, -torch.inf)


def kept_of_loss(kept: Tensor, loss: Loss, source: Tensor, vocabulary: int) -> KeptSets:
    """Return the sets of a loss whose tokens are of the whole vocabulary."""
    return KeptSets.of(kept, row_sequences(loss.arguments)[0], source, vocabulary)


def refuse_with_kept(inplace: bool, divided: bool) -> None:
    """Raise ValueError for what needs the logits of the whole vocabulary in this process."""
    if inplace:
        raise ValueError(
            "inplace=True is for the whole vocabulary: the gradient of kept logits is not as wide; got kept"
        )
    if divided:
        raise ValueError("kept takes a whole vocabulary; got one divided among processes: use kept=None, or no group")


def _check_values(index: Tensor, outside: Tensor, ids: Tensor, missing: Tensor, vocabulary: int) -> None:
    """Raise for ids outside the vocabulary, for a set that lacks its row's token, and for an id that comes twice."""
    if outside.any():
        raise IndexError(f"kept of live rows must be in [0, {vocabulary}) or -1; got {index[outside][0].item()}")
    if missing.any():
        row = int(missing.int().argmax())
        raise ValueError(f"kept must hold the token of each live row; row {row} lacks its token {ids[row].item()}")
    ordered = index.sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        raise ValueError(f"kept must hold an id once in a row; got {ordered[:, 1:][twice][0].item()} twice")
