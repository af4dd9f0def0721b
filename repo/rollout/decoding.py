"""Decoding: the choice of the way in which a model samples, by a trial of each way against single sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from repo_kernels.layers.packed_linear import packed_linears

from ..common.config_fields import config_field
from ..common.errors import UserError, first_line
from ..data.sequences import make_sequences
from ..data.token_ids import plain_ids
from ..models.layers import uncompiled
from ..models.layout import relative_difference
from ..models.policy import Policy
from .fused_decoder import FusedDecoder, why_unfused
from .graphs.choice import choose_step
from .graphs.held import graph_decoder
from .kv_cache import Decoder, GrowingDecoder, RereadingDecoder, cache_argument

PROMPTS = (6, 3)  # tokens of the prompts of the trial, which has two samples of each: rows 0 and 1, 2 and 3
STEPS = 2  # tokens that the trial appends to each row; row 1 is dropped after the first
LONGEST_WINDOW = 64  # sliding windows of more tokens are not tried, which would take too long
COMPARED = (0, 3)  # rows whose logits are compared; the second one moves up when row 1 is dropped


@dataclass(frozen=True)
class Decoding:
    """The way in which a model samples.

    batches: prompts of different lengths share a batch, padded on the left; else a batch is one prompt's samples.
    cached: keys, values and states of earlier tokens are kept; else every token reads all earlier ones again.
    selects: rows of the cache are repeated for the samples of a prompt, and dropped when they have ended.
    why: what is wrong with the faster ways, "" for the first.
    """

    batches: bool
    cached: bool
    selects: bool
    why: str = ""

    def describe(self) -> str:
        """Describe it in one line."""
        name = "token by token, growing KV cache" if self.cached else "token by token, without a cache"
        name += "" if self.batches else ", one prompt at a time"
        return name + f" ({self.why})" * bool(self.why)

    def decoder(self, model: Any, limit: int) -> Decoder:
        """Make a decoder for responses of at most `limit` tokens."""
        return GrowingDecoder(model, limit, self.batches, self.selects) if self.cached else RereadingDecoder(model)


WAYS = (
    Decoding(batches=True, cached=True, selects=True),
    Decoding(batches=False, cached=True, selects=True),
    Decoding(batches=False, cached=True, selects=False),
    Decoding(batches=False, cached=False, selects=True),
)

_chosen: WeakKeyDictionary[nn.Module, Decoding] = WeakKeyDictionary()


def choose_decoding(policy: Policy) -> Decoding:
    """Return the first of WAYS whose logits are those of single sequences read whole. Kept for each model.

    Raises UserError, which names the differences, if none is.
    """
    if policy.model not in _chosen:
        with uncompiled(policy.model):
            _chosen[policy.model] = _first_exact(policy.exact())
    return _chosen[policy.model]


@torch.no_grad()
def _first_exact(policy: Policy) -> Decoding:
    """Try the ways one after another; see choose_decoding."""
    window = config_field(policy.model.config.get_text_config(), "sliding_window", 0)
    longest = max(PROMPTS[0], window + 1 if window <= LONGEST_WINDOW else 0)
    ids = plain_ids(policy.model, 2 * len(PROMPTS), longest + STEPS, "decode probe")
    prompts = [ids[i, :length].tolist() for i, length in enumerate((longest, *PROMPTS[1:]))]
    tokens = ids[:, -STEPS:].to(policy.device)
    name, reasons = type(policy.model).__name__, []
    expected = _read_alone(policy, prompts, tokens)
    for way in WAYS:
        if way.cached and cache_argument(policy.model) is None:
            continue
        try:
            with policy.running():
                got = _decode(policy, way, prompts, tokens)
        except Exception as error:  # models raise errors of many types
            reasons.append(f"{_words(way)} fails: {first_line(error)}")
            continue
        difference = relative_difference(got, expected)
        if difference < (1e-4 if expected.dtype == torch.float32 else 0.1):
            return Decoding(way.batches, way.cached, way.selects, reasons[0] if reasons else "")
        reasons.append(f"{_words(way)} changes the logits of {name} by {difference:.1e}")
    raise UserError(
        f"model.path: {name} cannot sample here, since no way of decoding gives the logits of sequences read alone: "
        + "; ".join(reasons)
    )


def _words(way: Decoding) -> str:
    """Name a way of decoding in messages."""
    if not way.cached:
        return "reading every prefix again"
    if way.batches:
        return "decoding a padded batch"
    return "decoding with a cache" if way.selects else "decoding with a cache whose rows stay"


def _read_alone(policy: Policy, prompts: list[list[int]], tokens: Tensor) -> Tensor:
    """Compute the logits (rows * (STEPS + 1), V) of the rows to compare, each from one plain pass of the model."""
    logits = []
    autocast = policy.autocast is not None
    with policy.adapters(), torch.autocast(policy.device.type, policy.autocast, enabled=autocast):
        for row in COMPARED:
            prompt = torch.tensor(prompts[row // 2], device=policy.device)
            out = policy.model(input_ids=torch.cat((prompt, tokens[row]))[None], use_cache=False)
            logits.append(out.logits[0, len(prompt) - 1 :])
    return torch.cat(logits)


def _decode(policy: Policy, way: Decoding, prompts: list[list[int]], tokens: Tensor) -> Tensor:
    """Compute the same logits by decoding the prompts as `way` says."""
    logits, everything = [], list(range(len(prompts)))
    for batch in [everything] if way.batches else [[i] for i in everything]:
        decoder = way.decoder(policy.model, STEPS)
        prefix = make_sequences([prompts[i] for i in batch], [[]] * len(batch), policy.pad_id).to(policy.device)
        rows = [2 * i + sample for i in batch for sample in (0, 1)]
        steps = [decoder.start(prefix, 2), decoder.step(tokens[rows, 0])]
        stay = torch.tensor([place for place, row in enumerate(rows) if row != 1], device=policy.device)
        kept = rows
        if len(stay) < len(rows) and decoder.keep(stay):
            kept = [row for row in rows if row != 1]
        steps.append(decoder.step(tokens[kept, 1]))
        for row in set(rows) & {*COMPARED}:
            logits += [step[(rows if i < STEPS else kept).index(row)] for i, step in enumerate(steps)]
    return torch.stack(logits)


@contextmanager
def running_decoder(policy: Policy, rows: int, width: int, limit: int) -> Iterator[Decoder]:
    """Context with the fastest decoder of a model. It packs or casts the weights once, so they must not change inside.

    On CUDA its buffers and graphs are kept for the next rollout; see graphs/held.py.

    Args:
        policy: inside its `running()` context.
        rows: largest number of rows of a batch.
        width: largest number of tokens of a prompt.
        limit: largest number of tokens of a response.
    """
    decoding = choose_decoding(policy)
    if policy.device.type == "cpu" and not _why_slower(policy):
        half = policy.matmul is not None and policy.matmul.half
        fused = FusedDecoder(policy.model, limit, torch.bfloat16 if half else torch.float32)
        with fused.linears():
            yield fused
        return
    if policy.device.type == "cuda" and not _why_slower(policy):
        with graph_decoder(policy, rows, width, limit) as static:
            yield static
        return
    with packed_linears(policy.model, rows):
        yield decoding.decoder(policy.model, limit)


def describe_decoding(policy: Policy) -> str:
    """Describe in one line how responses are decoded, and why not in the fastest way of the device."""
    decoding, device = choose_decoding(policy), policy.device.type
    if decoding.why or device not in ("cuda", "cpu"):
        return f"decoding: {decoding.describe()}"
    with policy.exact().running():
        why = _why_slower(policy)
        if why:
            return f"decoding: {decoding.describe()} ({why})"
        return f"decoding: {choose_step(policy).describe() if device == 'cuda' else 'one C++ call per token'}"


def _why_slower(policy: Policy) -> str:
    """Return the reason why a model is not decoded in the fastest way of its device, "" if it is."""
    if choose_decoding(policy).why:
        return choose_decoding(policy).why
    if policy.device.type == "cuda":
        choice = choose_step(policy)
        return "" if choice.name else choice.why
    return why_unfused(policy)
