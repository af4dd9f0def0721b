"""Conversations: turns of role and content, checked and written as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..common.errors import UserError

Turn = dict[str, str]
ROLES = ("system", "user", "assistant")


def check_turns(value: Any, where: str) -> list[Turn]:
    """Check a text or a conversation and return its turns. Raises UserError that names the turn at fault.

    where: the place of the value, for messages.
    """
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


def transcript(turns: Iterable[Turn]) -> str:
    """Write a conversation as text, one "role: content" per turn."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def with_system(turns: list[Turn], system_prompt: str | None) -> list[Turn]:
    """Return the turns, with the system prompt first unless it is None or they begin with a system message."""
    if system_prompt is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system_prompt}, *turns]
