"""Prompts: read from files or Hugging Face datasets, tokenised once, drawn by a cursor of the step."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..common.errors import UserError, first_line
from ..common.seeds import generator

T = TypeVar("T")
Turn = dict[str, str]
ROLES = ("system", "user", "assistant")
HUB_NAME = re.compile(r"[\w-]+/[\w-]+(\.\d[\w-]*)*")  # a dot before a letter is that of a file


@dataclass(frozen=True)
class Prompt:
    """text: what the user asks, or a transcript of several turns; token_ids: the chat-formatted prompt up to where the
    response begins; messages: the turns of a conversation, () for a single question; response: a supervised answer."""

    id: str
    text: str
    category: str
    token_ids: tuple[int, ...] = ()
    messages: tuple[Turn, ...] = ()
    response: str | None = None

    @property
    def conversation(self) -> list[Turn]:
        """Messages of role and content that end with the user's."""
        return list(self.messages) or [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Example:
    """A supervised answer: the chat-formatted prompt, and the response up to its end-of-sequence token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class Tokenized(Generic[T]):
    """What tokenisation kept, and how many it dropped for what reason."""

    kept: list[T]
    dropped: dict[str, int]

    def report(self) -> str:
        """One line, e.g. "dropped: 3 longer than 256 tokens, 2 repeated"."""
        return f"dropped: {', '.join(f'{n} {why}' for why, n in self.dropped.items()) or 'none'}"


def load_prompts(source: str | Path, column: str = "prompt", split: str = "train") -> list[Prompt]:
    """Prompts of a JSON lines or parquet file, of a folder (datasets.save_to_disk, or data files) or of a hub name.

    Folders and hub names take `#split` or `#config/split` behind them; without it, `split` is read. A record has
    `column` or else `messages`, a text or a conversation, and optionally `id`, `category` and `response`. Without an
    id it gets the hash of its text, so repeated prompts share one. UserError names the line or row (from 1) at fault.
    """
    prompts, found_at = [], dict[str, str]()
    for where, record in _records(str(source), column, split):
        prompt = _parse(record, column, where)
        if record.get("id") is not None:
            if prompt.id in found_at:
                raise UserError(f"{where}: same id {prompt.id!r} as {found_at[prompt.id]}")
            found_at[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"no prompts in {source}")
    return prompts


def _records(source: str, column: str, split: str) -> Iterator[tuple[str, Any]]:
    """(where it stands, record) of every record."""
    name, _, part = source.rpartition("#") if "#" in source and not Path(source).exists() else (source, "", "")
    path = Path(name)
    if not path.exists() and not HUB_NAME.fullmatch(name):
        raise UserError(f"prompt file not found: {name}")
    if path.is_file() and part:
        raise UserError(f"{source}: a file has no splits; leave out #{part}")
    if path.is_file() and path.suffix != ".parquet":
        yield from _json_lines(path)
        return
    table = _table(source, name, part, split)
    columns = [c for c in {column, "messages", "id", "category", "response"} if c in table.column_names]
    if not {column, "messages"} & {*columns}:
        raise UserError(f"{source} has no column `{column}` or `messages`; it has: {', '.join(table.column_names)}")
    yield from ((f"{source} row {n}", row) for n, row in enumerate(table.select_columns(columns), 1))


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
                yield f"{path}:{number}", record
            except (ValueError, RecursionError) as error:  # or no UTF-8
                raise UserError(f"{path}:{number}: not JSON: {error}") from None


def _table(source: str, name: str, part: str, split: str) -> Any:
    """The datasets.Dataset behind a parquet file, folder or hub name."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from None
    path = Path(name).resolve()  # absolute, since load_dataset takes a bare "json" or "csv" for a format
    config, _, chosen = part.rpartition("/")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path) if path.is_dir() else name, config or None)
    except Exception as error:  # each format raises its own; the cause of a failed generation says more than it
        told = " ".join(f"{type(error).__name__}: {error} {error.__cause__ or ''}".split())
        raise UserError(f"cannot read {source} as name, name#split or name#config/split: {told:.300}") from error
    splits = found if isinstance(found, dict) else {} if part else {split: found}
    if (chosen or split) not in splits:
        raise UserError(f"{source} has no split {chosen or split!r}; there are: {', '.join(splits) or 'none'}")
    return splits[chosen or split]


def _parse(record: Any, column: str, where: str) -> Prompt:
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be an object with `{column}`; got {record!r:.80}")
    name = "messages" if record.get(column) is None and record.get("messages") is not None else column
    turns, identity = _turns(record.get(name), f"{where}: `{name}`"), record.get("id")
    response = record["response"] if isinstance(record.get("response"), str) else None
    if turns[-1]["role"] == "assistant" and not response:
        response = turns.pop()["content"]
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{where}: `{name}` must end with a user's turn, or without `response` with one answer to it")
    text = _transcript(turns) if turns[1:] else turns[0]["content"]
    identity = hashlib.sha256(text.encode()).hexdigest()[:16] if identity is None else str(identity)
    messages = tuple(turns) if turns[1:] else ()
    return Prompt(identity, text, str(record.get("category") or ""), (), messages, response or None)


def _turns(value: Any, where: str) -> list[Turn]:
    """The turns of a text or a conversation, checked one by one."""
    if isinstance(value, str) and value.strip():
        return [{"role": "user", "content": value}]
    if not (isinstance(value, list) and value):
        raise UserError(f"{where} must be a non-empty string or a list of role and content; got {value!r:.80}")
    for number, turn in enumerate(value, 1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, turn)
        if role not in ROLES:
            raise UserError(f"{where} turn {number}: `role` must be system, user or assistant; got {role!r:.80}")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where} turn {number}: `content` must be a non-empty string; got {content!r:.80}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _transcript(turns: Iterable[Turn]) -> str:
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _with_system(prompt: Prompt, system_prompt: str | None) -> list[Turn]:
    if system_prompt is None or prompt.conversation[0]["role"] == "system":
        return prompt.conversation
    return [{"role": "system", "content": system_prompt}, *prompt.conversation]


def _render(tokenizer: Any, turns: list[Turn], add_generation_prompt: bool) -> list[int]:
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, return_dict=True)
    except Exception as error:  # templates raise what they like, e.g. for a system message
        raise UserError(f"the model's chat template refuses a prompt: {first_line(error)}") from error
    return list(encoded["input_ids"])


def encode_prompt(tokenizer: Any, prompt: Prompt, system_prompt: str | None = None) -> list[int]:
    """Token ids up to where the response begins. system_prompt: the first message where the prompt brings none.

    Without a chat template: the bare text of a question, after that of the system prompt; a conversation's transcript
    up to "assistant:".
    """
    turns = _with_system(prompt, system_prompt)
    if tokenizer.chat_template is not None:
        return _render(tokenizer, turns, add_generation_prompt=True)
    plain = f"{_transcript(turns)}\nassistant:" if prompt.messages else "\n".join(turn["content"] for turn in turns)
    return list(tokenizer(plain).input_ids)


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, system_prompt: str | None, max_tokens: int
) -> Tokenized[Prompt]:
    """Prompts with their token ids: each id once, 1 to max_tokens tokens. UserError when none is left."""
    encoded = (replace(p, token_ids=tuple(encode_prompt(tokenizer, p, system_prompt))) for p in prompts)
    return _within(((p.id, p, len(p.token_ids)) for p in encoded), max_tokens)


def tokenize_examples(
    prompts: Sequence[Prompt], tokenizer: Any, system_prompt: str | None, max_tokens: int, eos_ids: Sequence[int] = ()
) -> Tokenized[Example]:
    """Prompts and their responses: each pair once, at most max_tokens together. UserError without a response.

    eos_ids: the tokens that end a response (default: the tokenizer's own); the first is put where there is none.
    """
    ends = tuple(eos_ids) or (tokenizer.eos_token_id,)
    pairs = ((p, _encode_example(tokenizer, p, system_prompt, ends)) for p in prompts)
    sized = (((p.id, p.response), e, len(e.prompt_ids) + len(e.response_ids)) for p, e in pairs)
    return _within(sized, max_tokens)


def _encode_example(tokenizer: Any, prompt: Prompt, system_prompt: str | None, ends: tuple[int, ...]) -> Example:
    """The response is what the chat template puts after the prompt, or the bare text where it rewrites the prompt."""
    if prompt.response is None:
        raise UserError(f"prompt {prompt.id!r} has no `response`, which a supervised example needs")
    start, whole = encode_prompt(tokenizer, prompt, system_prompt), []
    if tokenizer.chat_template is not None:
        turns = [*_with_system(prompt, system_prompt), {"role": "assistant", "content": prompt.response}]
        whole = _render(tokenizer, turns, add_generation_prompt=False)
    ids = whole[len(start) :] if whole[: len(start)] == start else []
    while ids and not tokenizer.decode(ids[-1:]).strip():  # the newline that templates put after the end of a turn
        ids.pop()
    ids = ids or list(tokenizer(prompt.response, add_special_tokens=False).input_ids)
    if not (ids and ids[-1] in ends):
        ids.append(ends[0])
    return Example(tuple(start), tuple(ids))


def _within(items: Iterable[tuple[Any, T, int]], max_tokens: int) -> Tokenized[T]:
    """The items of (key, item, tokens) that are the first of their key and fit. UserError when none is left."""
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
        limit = "data.max_prompt_tokens and the model's context set the limit"
        raise UserError(f"no prompt is left of {dropped.total()}; {result.report()}; {limit}")
    return result


def batch_at(items: Sequence[T], step: int, size: int, seed: int, stream: str = "epoch") -> list[T]:
    """The items of a step: consecutive entries of one fresh permutation per epoch, of its own for each stream."""
    count, positions = len(items), range(step * size, (step + 1) * size)
    epochs = {p // count for p in positions}
    orders = {e: torch.randperm(count, generator=generator(seed, stream, e)).tolist() for e in epochs}
    return [items[orders[p // count][p % count]] for p in positions]
