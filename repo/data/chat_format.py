"""Chat format: conversations as token ids, by a tokenizer's chat template or as plain text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from ..common.errors import UserError, first_line
from .conversation import Turn, transcript

OWN_ARGUMENTS = ("messages", "add_generation_prompt")
NOW = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")
PROBE = "What is bread?"


class ChatFormat:
    """The form in which a model reads conversations.

    A tokenizer without a chat template gets plain text: a question as it is, a conversation as a transcript that ends
    with "assistant:". A template for several media gets each text as a list with one part.
    """

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any] | None = None,
        date: str | None = None,
        whose: str = "the model's",
    ) -> None:
        """Check the arguments. Raises UserError for one that the template does not mention.

        arguments: variables of the template, e.g. {"enable_thinking": False}. date: YYYY-MM-DD, which a template that
        prints the date gets for today; None: today. whose: the owner of the template, for messages.
        """
        self.tokenizer, self.values, self.whose = tokenizer, dict(arguments or {}), whose
        source = str(tokenizer.chat_template or "")
        for name in self.values:
            if name in OWN_ARGUMENTS or not re.search(rf"\b{re.escape(name)}\b", source):
                has = "is filled by repo" if name in OWN_ARGUMENTS else "is not in the model's chat template"
                raise UserError(f"data.template_arguments: the variable {name!r} {has}")
        if date is not None and NOW.search(source):
            template = tokenizer.get_chat_template(tools=self.values.get("tools"))
            self.values["chat_template"] = with_date(template, datetime.fromisoformat(date))
        self.in_parts = bool(source) and not self._shows(PROBE) and self._shows([{"type": "text", "text": PROBE}])

    def _shows(self, content: Any) -> bool:
        """Return whether a question with this content is in its rendering; False too if the template refuses it."""
        turns = [{"role": "user", "content": content}]
        try:  # the reason of a refusal is told for the first conversation that it stops
            return PROBE in self.tokenizer.apply_chat_template(turns, tokenize=False, **self.values)
        except Exception:
            return False

    def render(self, turns: list[Turn], name: str, add_generation_prompt: bool = False) -> tuple[list[int], str]:
        """Apply the chat template; returns token ids and the text that they stand for.

        name: the prompt, for messages. Raises UserError if the template refuses the conversation.
        """
        inputs = self.encode_turns(turns, name, add_generation_prompt)
        return inputs["input_ids"], self._apply(turns, name, add_generation_prompt, tokenize=False)

    def encode_turns(self, turns: list[Turn], name: str, add_generation_prompt: bool = False) -> dict[str, list[int]]:
        """Apply the chat template; returns the model's inputs. Raises UserError if it refuses the conversation."""
        return {
            key: list(ids) for key, ids in self._apply(turns, name, add_generation_prompt, return_dict=True).items()
        }

    def _apply(self, turns: list[Turn], name: str, add_generation_prompt: bool, **options: bool) -> Any:
        content: list[Any] = turns
        if self.in_parts:
            content = [{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns]
        options |= {"add_generation_prompt": add_generation_prompt, **self.values}
        try:
            return self.tokenizer.apply_chat_template(content, **options)
        except Exception as error:  # a template may raise any type, e.g. for a system message
            raise UserError(f"{self.whose} chat template refuses a prompt: {first_line(error)}; {name}") from error

    def render_whole(self, turns: list[Turn], name: str, add_generation_prompt: bool = False) -> tuple[list[int], str]:
        """Do as render. Raises UserError too if the rendering lacks the text of a turn."""
        ids, text = self.render(turns, name, add_generation_prompt)
        if (number := lost_turn(text, turns)) is not None:
            turn = turns[number]
            raise UserError(
                f"{self.whose} chat template leaves out the text of a prompt's turn {number + 1}, "
                f"{turn['role']}: {turn['content']!r:.80}; {name}"
            )
        return ids, text

    def encode(self, turns: list[Turn], name: str, question: bool = False) -> list[int]:
        """Encode a conversation as token ids up to where the response begins.

        name: the prompt, for messages. question: the turns are a question and perhaps a system prompt, which need no
        roles where there is no template.
        """
        if self.tokenizer.chat_template is not None:
            return self.render_whole(turns, name, add_generation_prompt=True)[0]
        text = "\n".join(turn["content"] for turn in turns) if question else f"{transcript(turns)}\nassistant:"
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """Encode a text with the tokens that the tokenizer puts before it, but not those that it puts after it."""
        ids, bare = (list(self.tokenizer(text, add_special_tokens=special).input_ids) for special in (True, False))
        for start in range(len(ids) - len(bare) + 1):
            if ids[start : start + len(bare)] == bare:
                return ids[: start + len(bare)]
        return ids

    def encode_example(
        self, turns: list[Turn], response: str, name: str, ends: Sequence[int], question: bool = False
    ) -> tuple[list[int], list[int]]:
        """Encode a conversation and its response as two lists of token ids.

        The template's rendering of both is split where it departs from the prompt's own rendering, e.g. at a thinking
        block that it opens for a response to come and writes otherwise around one that is there. If it renders the
        conversation otherwise once a response follows, or shortens the response, the response is its bare text.

        name, question: see encode. ends: token ids that end a response; the first is appended where none is.
        """
        if self.tokenizer.chat_template is None:
            start, ids = self.encode(turns, name, question), self._bare(response)
        else:
            start, ids = self._split(turns, response, name)
        if not (ids and ids[-1] in ends):
            ids.append(ends[0])
        return start, ids

    def _split(self, turns: list[Turn], response: str, name: str) -> tuple[list[int], list[int]]:
        """Do as encode_example by the chat template, without the end token where the template has none."""
        start, text = self.render_whole(turns, name, add_generation_prompt=True)
        answered = [*turns, {"role": "assistant", "content": response}]
        whole, whole_text = self.render(answered, name)
        common = text[: _common(text, whole_text)]
        if lost_turn(common, turns) is not None or lost_turn(whole_text, answered, shortened=False) is not None:
            return start, self._bare(_after_opening(text, response, name))
        split = _common(start, whole)
        ids = whole[split:]
        while ids and not self.tokenizer.decode(ids[-1:]).strip():  # a newline after the end of a turn
            ids.pop()
        return start[:split], ids

    def _bare(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def with_date(template: str, day: datetime) -> str:
    """Write a date into a chat template where it asks for today's in a format that it spells out.

    A function in place of strftime_now would be simpler, but transformers passes only plain data to a template.
    """
    return NOW.sub(lambda call: json.dumps(day.strftime(call["format"]), ensure_ascii=False), template)


def _common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the longest common prefix."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))


def _after_opening(prompt: str, response: str, name: str) -> str:
    """Return what follows the prompt's text: the response, without <think> if the prompt has opened that block.

    Raises UserError if the prompt opens a thinking block and the response does not close it.
    """
    _, opening, rest = prompt.rpartition("<think>")
    if not opening or "</think>" in rest:
        return response
    if "</think>" not in response:
        raise UserError(
            f"the model's chat template begins a response with <think>, and the response has no </think>; {name}"
        )
    return response.removeprefix("<think>").lstrip("\n")


def lost_turn(text: str, turns: Sequence[Turn], shortened: bool = True) -> int | None:
    """Return the index of the first turn whose content is not in a rendering, None if all are there.

    shortened: of an assistant's turn only what follows </think> must be there.
    """
    contents = [turn["content"] for turn in turns]
    if shortened:
        contents = [
            c.rpartition("</think>")[2] if t["role"] == "assistant" else c for c, t in zip(contents, turns, strict=True)
        ]
    contents = [content.strip() for content in contents]
    return next((n for n in range(len(contents)) if not _has_all(text, contents, n)), None)


def _has_all(text: str, contents: list[str], number: int) -> bool:
    """Return whether a content is in the text as often as in all contents; white space may differ."""
    content = contents[number]
    if not content or text.count(content) >= sum(other.count(content) for other in contents):
        return True
    bare, wanted = "".join(text.split()), "".join(content.split())
    return bare.count(wanted) >= sum("".join(other.split()).count(wanted) for other in contents)
