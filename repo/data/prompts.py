"""Prompts: make them from records, tokenise them, and choose those of a step."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..common.errors import UserError
from ..common.seeds import generator
from .chat_format import ChatFormat
from .conversation import Turn, check_turns, transcript, with_system
from .records import read_records, require_column

T = TypeVar("T")
COLUMN = "prompt"


@dataclass(frozen=True)
class Example:
    """A given answer as token ids: the chat-formatted prompt, and the response with its end-of-sequence token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt of the training or held-out data.

    id: from the record, else a hash of the text. text: the user's question, or a transcript of several turns.
    category: "" where the record has none. token_ids: the chat-formatted prompt up to where the response begins, ()
    before tokenisation. messages: the turns of a conversation, () for a single question. response: a supervised answer,
    None where there is none. columns: the whole record, name -> value. where: file and line or row, for messages.
    pair: two responses that the record gives, after the same prompt tokens; () where a run samples its responses.
    """

    id: str
    text: str
    category: str
    token_ids: tuple[int, ...] = ()
    messages: tuple[Turn, ...] = ()
    response: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)
    pair: tuple[Example, ...] = ()

    @property
    def conversation(self) -> list[Turn]:
        """Return the messages, dicts of role and content, of which the last is the user's."""
        return list(self.messages) or [{"role": "user", "content": self.text}]

    @property
    def name(self) -> str:
        """Return the id and the place, for messages."""
        return f"prompt {self.id!r}" + (f", {self.where}" if self.where else "")


@dataclass(frozen=True)
class Tokenized(Generic[T]):
    """The result of tokenisation. kept: the items. dropped: reason -> number of items that were dropped for it."""

    kept: list[T]
    dropped: dict[str, int]

    def report(self) -> str:
        """Describe in one line what was dropped, e.g. "dropped: 3 longer than 256 tokens, 2 repeated"."""
        return f"dropped: {', '.join(f'{n} {why}' for why, n in self.dropped.items()) or 'none'}"


def load_prompts(source: str | Path, column: str = COLUMN, split: str = "train") -> list[Prompt]:
    """Read prompts from a JSON lines, JSON, csv, tsv or parquet file, a folder or a hub dataset.

    A folder is one of datasets.save_to_disk, or one of data files.

    A record has the prompt in `column` or else in `messages`, as a text or a conversation, and optionally `id`,
    `category` and `response`. Without an id it gets the hash of its text, so that repeated prompts share one.

    source: path or hub name; folders and hub names may end with `#split` or `#config/split`. split: read if none is
    named. Raises UserError that names the line or row at fault, counted from 1, and for a column that no record has.
    """
    records = list(read_records(str(source), split))
    require_column(column, COLUMN, (record for _, record in records), str(source))
    prompts, place_of_id = [], dict[str, str]()
    for where, record in records:
        prompt = _parse(record, column, where)
        if record.get("id") is not None:
            if prompt.id in place_of_id:
                raise UserError(f"{where}: same id {prompt.id!r} as {place_of_id[prompt.id]}")
            place_of_id[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"no prompts in {source}")
    return prompts


def _parse(record: Any, column: str, where: str) -> Prompt:
    """Check one record and make it a Prompt. where: its place, for messages. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be an object with `{column}`; got {record!r:.80}")
    name = "messages" if record.get(column) is None and record.get("messages") is not None else column
    turns, identity = check_turns(record.get(name), f"{where}: `{name}`"), record.get("id")
    response = record["response"] if isinstance(record.get("response"), str) else None
    if turns[-1]["role"] == "assistant" and not response:
        response = turns.pop()["content"]
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{where}: `{name}` must end with a user's turn, or if there is no `response` with one answer")
    text = transcript(turns) if turns[1:] else turns[0]["content"]
    identity = hashlib.sha256(text.encode()).hexdigest()[:16] if identity is None else str(identity)
    messages = tuple(turns) if turns[1:] else ()
    return Prompt(identity, text, str(record.get("category") or ""), (), messages, response or None, record, where)


def encode_prompt(
    tokenizer: Any, prompt: Prompt, system_prompt: str | None = None, chat: ChatFormat | None = None
) -> list[int]:
    """Encode a prompt as token ids up to where the response begins.

    system_prompt: the first message where the prompt has no system message; None adds none. chat: the format, by
    default the tokenizer's. Raises UserError if the chat template refuses the prompt or leaves out some of its text.
    """
    turns = with_system(prompt.conversation, system_prompt)
    return (chat or ChatFormat(tokenizer)).encode(turns, prompt.name, not prompt.messages)


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    system_prompt: str | None,
    max_tokens: int,
    chat: ChatFormat | None = None,
) -> Tokenized[Prompt]:
    """Encode prompts; keep those of 1 to max_tokens tokens, each id once.

    chat: the format, by default the tokenizer's. Raises UserError if none is left, or as encode_prompt does.
    """
    chat = chat or ChatFormat(tokenizer)
    encoded = (replace(p, token_ids=tuple(encode_prompt(tokenizer, p, system_prompt, chat))) for p in prompts)
    return keep_within(((p.id, p, len(p.token_ids)) for p in encoded), max_tokens)


def tokenize_examples(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    system_prompt: str | None,
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    chat: ChatFormat | None = None,
) -> Tokenized[Example]:
    """Encode prompts with their responses, and keep those of at most max_tokens together, each pair once.

    eos_ids: the tokens that end a response, by default the tokenizer's own; the first is appended where none is. chat:
    the format, by default the tokenizer's. Raises UserError if a prompt has no response or no example is left.
    """
    ends, chat = tuple(eos_ids) or (tokenizer.eos_token_id,), chat or ChatFormat(tokenizer)

    def encode(prompt: Prompt) -> Example:
        if prompt.response is None:
            where = f"{prompt.where}: " if prompt.where else ""
            raise UserError(f"{where}prompt {prompt.id!r} has no `response`, which a supervised example needs")
        turns = with_system(prompt.conversation, system_prompt)
        start, ids = chat.encode_example(turns, prompt.response, prompt.name, ends, not prompt.messages)
        return Example(tuple(start), tuple(ids))

    pairs = ((p, encode(p)) for p in prompts)
    sized = (((p.id, p.response), e, len(e.prompt_ids) + len(e.response_ids)) for p, e in pairs)
    return keep_within(sized, max_tokens)


def keep_within(
    items: Iterable[tuple[Any, T, int]],
    max_tokens: int,
    what: str = "prompt",
    limit: str = "data.max_prompt_tokens and the model's context set the limit",
) -> Tokenized[T]:
    """Keep the items that fit and are the first with their key, and count the others by reason.

    items: (key, item, number of tokens). what, limit: name an item and what sets max_tokens, for messages. Raises
    UserError if no item is left.
    """
    kept, dropped, seen = [], Counter[str](), set()
    for key, item, tokens in items:
        fault = "empty" if tokens == 0 else f"longer than {max_tokens} tokens" if tokens > max_tokens else None
        fault = "repeated" if key in seen else fault
        seen.add(key)
        if fault:
            dropped[fault] += 1
        else:
            kept.append(item)
    result = Tokenized(kept, dict(dropped))
    if not kept:
        raise UserError(f"no {what} is left of {dropped.total()}; {result.report()}; {limit}")
    return result


def batch_at(items: Sequence[T], step: int, size: int, seed: int, stream: str = "epoch") -> list[T]:
    """Return the `size` items of a step, which are consecutive entries of a new permutation for each epoch.

    step: from 0. seed, stream: the permutations depend on these and the epoch alone.
    """
    count, positions = len(items), range(step * size, (step + 1) * size)
    epochs = {p // count for p in positions}
    orders = {e: torch.randperm(count, generator=generator(seed, stream, e)).tolist() for e in epochs}
    return [items[orders[p // count][p % count]] for p in positions]
