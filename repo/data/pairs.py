"""Pairs: two responses that a record gives to its prompt, in the columns that PKU-SafeRLHF has."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..common.errors import UserError
from .chat_format import ChatFormat
from .conversation import with_system
from .prompts import Example, Prompt, Tokenized, keep_within

COLUMNS = ("response_0", "response_1")


def have_pairs(prompts: Sequence[Prompt]) -> bool:
    """Tell whether the records of the prompts give a pair of responses in COLUMNS; False if none has either column.

    Raises UserError that names the first record with only one response, with none where others have a pair, or with
    one that is not a text.
    """
    given = [any(p.columns.get(name) is not None for name in COLUMNS) for p in prompts]
    if not any(given):
        return False
    for prompt in prompts:
        for name in COLUMNS:
            response = prompt.columns.get(name)
            if not isinstance(response, str) or not response.strip():
                both = " and ".join(f"`{column}`" for column in COLUMNS)
                raise UserError(
                    f"{prompt.where or prompt.name}: a pair needs {both}, non-empty texts; `{name}` is {response!r:.80}"
                )
    return True


def texts_of(prompt: Prompt) -> list[str]:
    """Return both responses that a prompt's record gives."""
    return [prompt.columns[name] for name in COLUMNS]


def with_ids_of_pairs(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Give each prompt without an id of its own one that depends on its pair too, so that all its pairs are kept."""
    return [p if p.columns.get("id") is not None else replace(p, id=_id_of(p)) for p in prompts]


def _id_of(prompt: Prompt) -> str:
    return hashlib.sha256("\x1f".join((prompt.text, *texts_of(prompt))).encode()).hexdigest()[:16]


def tokenize_pairs(
    prompts: Sequence[Prompt],
    tokenizer: Any,
    system_prompt: str | None,
    max_tokens: int,
    eos_ids: Sequence[int] = (),
    chat: ChatFormat | None = None,
) -> Tokenized[Prompt]:
    """Encode the pair of each prompt into `pair`, and keep the prompts whose responses have at most max_tokens each.

    eos_ids: the tokens that end a response, by default the tokenizer's own; the first is appended where none is. chat:
    the format, by default the tokenizer's. Raises UserError if no pair is left.
    """
    ends, chat = tuple(eos_ids) or (tokenizer.eos_token_id,), chat or ChatFormat(tokenizer)
    encoded = [replace(p, pair=_encode(p, chat, system_prompt, ends)) for p in prompts]
    sized = ((p.id, p, max(len(e.response_ids) for e in p.pair)) for p in encoded)
    return keep_within(sized, max_tokens, "pair", "rollout.max_response_tokens sets the limit of each response")


def _encode(prompt: Prompt, chat: ChatFormat, system_prompt: str | None, ends: Sequence[int]) -> tuple[Example, ...]:
    """Encode both responses of a prompt after the same prompt tokens, the longest that both encodings begin with."""
    turns = with_system(prompt.conversation, system_prompt)
    both = [chat.encode_example(turns, text, prompt.name, ends, not prompt.messages) for text in texts_of(prompt)]
    (start, _), (other, _) = both
    shared = next(
        (n for n, (a, b) in enumerate(zip(start, other, strict=False)) if a != b), min(map(len, (start, other)))
    )
    return tuple(Example(tuple(start[:shared]), (*begin[shared:], *response)) for begin, response in both)
