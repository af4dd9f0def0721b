"""Stop tokens: every token that ends a response, from the model, the chat template and the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..common.errors import UserError, first_line
from ..data.chat_format import ChatFormat
from ..models.policy import Policy, vocabulary

ANSWER = "answer-7391"
"""Text of the answer that a chat template is tried with; no template contains it."""


def with_stop_tokens(policy: Policy, extra: Sequence[int | str]) -> tuple[Policy, str | None]:
    """Add to the ids that end a response those of the configuration and the one that the chat template ends a turn by.

    extra: rollout.stop_tokens.
    Returns the policy and a line about the template's token, None if the model names it already.
    Raises UserError if a stop token is not one token of the vocabulary.
    """
    named = [stop_id(policy.tokenizer, token, vocabulary(policy)) for token in extra]
    ends = tuple(dict.fromkeys((*policy.eos_ids, *named)))
    try:
        closing = closing_id(policy.tokenizer)
    except Exception as error:  # templates raise errors of many types
        reason = first_line(error)
        line = f"stop tokens: the chat template cannot show how it ends an answer ({reason}); none is added"
        return dataclasses.replace(policy, eos_ids=ends), line
    if closing is None or closing in ends:
        return dataclasses.replace(policy, eos_ids=ends), None
    text = policy.tokenizer.convert_ids_to_tokens(closing)
    line = f"stop tokens: {text!r} ({closing}) added, which the chat template puts after an answer"
    return dataclasses.replace(policy, eos_ids=(*ends, closing)), line


def stop_id(tokenizer: Any, token: int | str, size: int) -> int:
    """Return the id of a stop token. token: its id or its text. size: the model's vocabulary."""
    if isinstance(token, str):
        ids = tokenizer(token, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise UserError(f"rollout.stop_tokens: {token!r} must be one token of the tokenizer; it is {len(ids)}")
        return int(ids[0])
    if not 0 <= token < size:
        raise UserError(f"rollout.stop_tokens: an id must be in 0..{size - 1}, the model's vocabulary; got {token}")
    return token


def closing_id(tokenizer: Any) -> int | None:
    """Return the id of the special token that the chat template puts after an answer; None if it puts none there."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    _, text = ChatFormat(tokenizer).render(turns, "an answer to try it with")
    behind = text.rpartition(ANSWER)[2].lstrip() if ANSWER in text else ""
    ids = tokenizer(behind, add_special_tokens=False).input_ids if behind else []
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return ids[0] if ids and ids[0] in special else None
