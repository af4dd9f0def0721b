"""Make the rows of prompt, reply and targets that the scorer and judge heads are fitted on.

Heads fitted on human labels alone make two errors, both observed: benign replies of this policy score as harmful, and
gibberish scores as helpful. So each side also gets on-policy replies to benign prompts of its half, harmless everyday
instructions (both harm 0, helpful 1), and the replies of spoiled.py, which deserve no reward (helpful 0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data.conversation import with_system
from .everyday import topic
from .prompts import Split
from .sources import Label, Prompt, all_labels, deduplicate, label_half, normalise

REPLY_TOKENS = 40
"""Tokens of an on-policy reply, as in the default training run."""

TEMPERATURE = 0.7
"""Sampling temperature of the reference samples, as in the default training run."""

ON_POLICY = {"scorer": {1.0: 224, TEMPERATURE: 224}, "judge": {1.0: 128}}
"""Side -> sampling temperature -> number of benign reserve prompts whose replies are sampled."""

REFERENCE_SAMPLES = 400
"""Number of on-policy replies to training prompts, which fix the units of the scores; no head is fitted on them."""

ACHIEVED_HARM = 0.73
"""Mean human harm grade of the 106 graded replies that are also labelled "objective achieved"."""


@dataclass(frozen=True)
class Row:
    """A prompt and reply that heads are fitted on.

    kind: origin of the row, such as harm, on-policy or shuffled.
    harm, helpful, refusal: targets in [0, 1]; None if the pair says nothing about that head.
    graded: `harm` is a human grade; figures of harm are measured on these rows only.
    topic: key of prompts that share a reply; "" for none.
    since: the targets hold once this many tokens of the reply have been read.
    """

    prompt: str
    reply: str
    kind: str
    harm: float | None = None
    helpful: float | None = None
    refusal: float | None = None
    graded: bool = False
    topic: str = ""
    since: int = 0

    @property
    def group(self) -> str:
        """Return the key of rows that must all be in one fold of the cross-validation."""
        return normalise(self.topic or self.prompt)


def label_rows(side: str) -> list[Row]:
    """Make rows of the human labels of one side, scorer or judge. A refusal counts as harm 0, whatever was asked."""
    rows = []
    for label in deduplicate(x for labels in all_labels().values() for x in labels):
        if label_half(label.objective) == side:
            rows.append(_row(label))
    return rows


def _row(label: Label) -> Row:
    pair = Row(label.objective, label.response, label.task)
    if label.task == "harm":
        return replace(pair, harm=label.score, graded=True)
    if label.task == "objective":
        return replace(pair, helpful=label.score, harm=ACHIEVED_HARM if label.score >= 0.5 else None)
    refused = label.score >= 0.5
    return replace(pair, refusal=float(refused), helpful=float(not refused), harm=0.0 if refused else None)


def on_policy_rows(prompts: Sequence[Prompt], replies: Sequence[str], kind: str = "on-policy") -> list[Row]:
    """Make rows of replies to benign prompts: harmless, helpful, no refusal. Empty replies are left out."""
    return [
        Row(p.prompt, r, kind, harm=0.0, helpful=1.0, refusal=0.0, topic=topic(p))
        for p, r in zip(prompts, replies, strict=True)
        if r.strip()
    ]


def reference_prompts(split: Split) -> list[Prompt]:
    """Return the training prompts whose sampled replies fix the units; they are already in a random order."""
    return split.train[:REFERENCE_SAMPLES]


def sample_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seed: int,
    temperature: float,
    system_prompt: str | None,
    batch: int = 128,
    done: Callable[[int], None] | None = None,
) -> list[str]:
    """Sample a reply of at most REPLY_TOKENS tokens to each prompt, from the untruncated distribution.

    system_prompt: message before each prompt; None for none. batch: prompts per call of the model. done: called with
    the number of replies so far.
    """
    torch.manual_seed(seed)
    replies = []
    for start in range(0, len(prompts), batch):
        chats = [
            with_system([{"role": "user", "content": p.prompt}], system_prompt) for p in prompts[start : start + batch]
        ]
        inputs = tokenizer.apply_chat_template(
            chats,
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        )
        out = model.generate(
            **inputs, max_new_tokens=REPLY_TOKENS, do_sample=True, temperature=temperature, top_p=1.0, top_k=0
        )
        replies += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if done:
            done(len(replies))
    return replies
