"""Prompts: read them from files or Hugging Face datasets, tokenise them, and choose those of a step."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from ..common.errors import UserError, first_line
from ..common.seeds import generator

T = TypeVar("T")
Turn = dict[str, str]
ROLES = ("system", "user", "assistant")
HUB_NAME = re.compile(r"[\w-]+/[\w-]+(\.\d[\w-]*)*")  # a dot before a letter means a file name


@dataclass(frozen=True)
class Prompt:
    """A prompt of the training or held-out data.

    id: from the record, else a hash of the text. text: the user's question, or a transcript of several turns.
    category: "" where the record has none. token_ids: the chat-formatted prompt up to where the response begins, ()
    before tokenisation. messages: the turns of a conversation, () for a single question. response: a supervised answer,
    None where there is none. columns: the whole record, name -> value. where: file and line or row, for messages.
    """

    id: str
    text: str
    category: str
    token_ids: tuple[int, ...] = ()
    messages: tuple[Turn, ...] = ()
    response: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)

    @property
    def conversation(self) -> list[Turn]:
        """Return the messages, dicts of role and content, of which the last is the user's."""
        return list(self.messages) or [{"role": "user", "content": self.text}]


@dataclass(frozen=True)
class Example:
    """A supervised answer as token ids: the chat-formatted prompt, and the response with its end-of-sequence token."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class Tokenized(Generic[T]):
    """The result of tokenisation. kept: the items. dropped: reason -> number of items that were dropped for it."""

    kept: list[T]
    dropped: dict[str, int]

    def report(self) -> str:
        """Describe in one line what was dropped, e.g. "dropped: 3 longer than 256 tokens, 2 repeated"."""
        return f"dropped: {', '.join(f'{n} {why}' for why, n in self.dropped.items()) or 'none'}"


def load_prompts(source: str | Path, column: str = "prompt", split: str = "train") -> list[Prompt]:
    """Read prompts from a JSON lines or parquet file, a folder (datasets.save_to_disk, or data files) or a hub dataset.

    A record has the prompt in `column` or else in `messages`, as a text or a conversation, and optionally `id`,
    `category` and `response`. Without an id it gets the hash of its text, so that repeated prompts share one.

    source: path or hub name; folders and hub names may end with `#split` or `#config/split`. split: read if none is
    named. Raises UserError that names the line or row at fault, counted from 1.
    """
    prompts, place_of_id = [], dict[str, str]()
    for where, record in _records(str(source), column, split):
        prompt = _parse(record, column, where)
        if record.get("id") is not None:
            if prompt.id in place_of_id:
                raise UserError(f"{where}: same id {prompt.id!r} as {place_of_id[prompt.id]}")
            place_of_id[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"no prompts in {source}")
    return prompts


def _records(source: str, column: str, split: str) -> Iterator[tuple[str, Any]]:
    """Yield (file and line, or source and row; record) for every record of a source."""
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
    """Yield ("path:line", record) for every line that is not blank. Raises UserError for a line that is not JSON."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # refuses half of a surrogate pair, which is not text
                yield f"{path}:{number}", record
            except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
                raise UserError(f"{path}:{number}: not JSON: {error}") from None


def _table(source: str, name: str, part: str, split: str) -> Any:
    """Load the datasets.Dataset of a parquet file, folder or hub name.

    source: for messages, as the user wrote it. name: source without `#part`. part: split or config/split, "" if none is
    named. split: read if part names none.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package datasets: pip install datasets") from None
    path = Path(name).resolve()  # absolute, because load_dataset reads a bare "json" or "csv" as a format
    config, _, chosen = part.rpartition("/")
    try:
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path) if path.is_dir() else name, config or None)
    except Exception as error:  # formats raise many types; the cause of a DatasetGenerationError is the real reason
        reason = " ".join(f"{type(error).__name__}: {error} {error.__cause__ or ''}".split())
        raise UserError(f"cannot read {source} as name, name#split or name#config/split: {reason:.300}") from error
    splits = loaded if isinstance(loaded, dict) else {} if part else {split: loaded}
    if (chosen or split) not in splits:
        raise UserError(f"{source} has no split {chosen or split!r}; there are: {', '.join(splits) or 'none'}")
    return splits[chosen or split]


def _parse(record: Any, column: str, where: str) -> Prompt:
    """Check one record and make it a Prompt. where: its place, for messages. Raises UserError."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be an object with `{column}`; got {record!r:.80}")
    name = "messages" if record.get(column) is None and record.get("messages") is not None else column
    turns, identity = _turns(record.get(name), f"{where}: `{name}`"), record.get("id")
    response = record["response"] if isinstance(record.get("response"), str) else None
    if turns[-1]["role"] == "assistant" and not response:
        response = turns.pop()["content"]
    if not turns or turns[-1]["role"] != "user":
        raise UserError(f"{where}: `{name}` must end with a user's turn, or if there is no `response` with one answer")
    text = _transcript(turns) if turns[1:] else turns[0]["content"]
    identity = hashlib.sha256(text.encode()).hexdigest()[:16] if identity is None else str(identity)
    messages = tuple(turns) if turns[1:] else ()
    return Prompt(identity, text, str(record.get("category") or ""), (), messages, response or None, record, where)


def _turns(value: Any, where: str) -> list[Turn]:
    """Check the turns of a text or a conversation and return them. Raises UserError that names the turn at fault."""
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
    """Write a conversation as text, one "role: content" per turn."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _with_system(prompt: Prompt, system_prompt: str | None) -> list[Turn]:
    """Return the conversation, with the system prompt first unless it begins with a system message of its own."""
    if system_prompt is None or prompt.conversation[0]["role"] == "system":
        return prompt.conversation
    return [{"role": "system", "content": system_prompt}, *prompt.conversation]


def _render(tokenizer: Any, turns: list[Turn], add_generation_prompt: bool) -> list[int]:
    """Apply the chat template and return token ids. Raises UserError if the template refuses the conversation."""
    try:
        encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=add_generation_prompt, return_dict=True)
    except Exception as error:  # a template may raise any type, e.g. for a system message
        raise UserError(f"the model's chat template refuses a prompt: {first_line(error)}") from error
    return list(encoded["input_ids"])


def encode_prompt(tokenizer: Any, prompt: Prompt, system_prompt: str | None = None) -> list[int]:
    """Encode a prompt as token ids up to where the response begins.

    A tokenizer without a chat template gets plain text: for a question the system prompt and the question, for a
    conversation the transcript that ends with "assistant:".

    system_prompt: the first message where the prompt has no system message; None adds none.
    """
    turns = _with_system(prompt, system_prompt)
    if tokenizer.chat_template is not None:
        return _render(tokenizer, turns, add_generation_prompt=True)
    plain = f"{_transcript(turns)}\nassistant:" if prompt.messages else "\n".join(turn["content"] for turn in turns)
    return list(tokenizer(plain).input_ids)


def tokenize_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, system_prompt: str | None, max_tokens: int
) -> Tokenized[Prompt]:
    """Encode prompts; keep those of 1 to max_tokens tokens, each id once. Raises UserError if none is left."""
    encoded = (replace(p, token_ids=tuple(encode_prompt(tokenizer, p, system_prompt))) for p in prompts)
    return _within(((p.id, p, len(p.token_ids)) for p in encoded), max_tokens)


def tokenize_examples(
    prompts: Sequence[Prompt], tokenizer: Any, system_prompt: str | None, max_tokens: int, eos_ids: Sequence[int] = ()
) -> Tokenized[Example]:
    """Encode prompts with their responses, and keep those of at most max_tokens together, each pair once.

    eos_ids: the tokens that end a response, by default the tokenizer's own; the first is appended where none is.
    Raises UserError if a prompt has no response or no example is left.
    """
    ends = tuple(eos_ids) or (tokenizer.eos_token_id,)
    pairs = ((p, _encode_example(tokenizer, p, system_prompt, ends)) for p in prompts)
    sized = (((p.id, p.response), e, len(e.prompt_ids) + len(e.response_ids)) for p, e in pairs)
    return _within(sized, max_tokens)


def _encode_example(tokenizer: Any, prompt: Prompt, system_prompt: str | None, ends: tuple[int, ...]) -> Example:
    """Encode a prompt and its response.

    The response's tokens are those that the chat template puts after the prompt. If the template renders the prompt
    otherwise once a response follows, they are those of the response's bare text.
    """
    if prompt.response is None:
        raise UserError(f"prompt {prompt.id!r} has no `response`, which a supervised example needs")
    start, whole = encode_prompt(tokenizer, prompt, system_prompt), []
    if tokenizer.chat_template is not None:
        turns = [*_with_system(prompt, system_prompt), {"role": "assistant", "content": prompt.response}]
        whole = _render(tokenizer, turns, add_generation_prompt=False)
    ids = whole[len(start) :] if whole[: len(start)] == start else []
    while ids and not tokenizer.decode(ids[-1:]).strip():  # templates put a newline after the end of a turn
        ids.pop()
    ids = ids or list(tokenizer(prompt.response, add_special_tokens=False).input_ids)
    if not (ids and ids[-1] in ends):
        ids.append(ends[0])
    return Example(tuple(start), tuple(ids))


def _within(items: Iterable[tuple[Any, T, int]], max_tokens: int) -> Tokenized[T]:
    """Keep the items that fit and are the first with their key, and count the others by reason.

    items: (key, item, number of tokens). Raises UserError if no item is left.
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
        limit = "data.max_prompt_tokens and the model's context set the limit"
        raise UserError(f"no prompt is left of {dropped.total()}; {result.report()}; {limit}")
    return result


def batch_at(items: Sequence[T], step: int, size: int, seed: int, stream: str = "epoch") -> list[T]:
    """Return the `size` items of a step, which are consecutive entries of a new permutation for each epoch.

    step: from 0. seed, stream: the permutations depend on these and the epoch alone.
    """
    count, positions = len(items), range(step * size, (step + 1) * size)
    epochs = {p // count for p in positions}
    orders = {e: torch.randperm(count, generator=generator(seed, stream, e)).tolist() for e in epochs}
    return [items[orders[p // count][p % count]] for p in positions]
