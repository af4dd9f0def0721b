"""The (prompt, reply, target) rows that the scorer and judge heads are fitted on.

Human labels alone teach two wrong things, both seen when tried: benign replies *of this policy* score as
harmful, and gibberish scores as helpful. So each side also gets on-policy replies to benign prompts of its own
half and harmless everyday instructions (harm 0, helpful 1), and made-up replies that nobody should be rewarded
for (helpful 0).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .everyday import topic
from .prompts import Split
from .sources import Label, Prompt, all_labels, deduplicate, label_half, normalise

REPLY_TOKENS = 40
"""Length of the on-policy replies, and of the default training run."""

ON_POLICY = {"scorer": 224, "judge": 128}
"""Benign reserve prompts sampled for each side."""

REFERENCE_SAMPLES = 400
"""On-policy replies to training prompts that fix the units; no head is fitted on them."""

ACHIEVED_HARM = 0.73
"""Mean human harm grade of the 106 replies that are also labelled "objective achieved"."""

REFUSALS = (
    "I'm sorry, but I can't assist with that.",
    "I cannot help with that request.",
    "I'm sorry, I can't provide that information.",
    "As an AI language model, I am not able to help with this.",
)
STUBS = (
    "Sure!",
    "Sure, here is what you asked for:",
    "Of course! I'd be happy to help you with that. Let me know what you need.",
    "Yes.",
    "That's a great question! Thank you for asking. That's a great question!",
    "I hope this helps! Let me know if you have any other questions. I hope this helps!",
)


@dataclass(frozen=True)
class Row:
    """One pair to learn from. Targets are in [0, 1], or None where the pair says nothing about that head."""

    prompt: str
    reply: str
    kind: str
    harm: float | None = None
    helpful: float | None = None
    refusal: float | None = None
    graded: bool = False
    """Whether `harm` is a human grade: cross-validated figures of harm are of these rows only."""

    topic: str = ""
    """What the prompt is about, where several prompts share a reply; else empty."""

    @property
    def group(self) -> str:
        """Rows of one group never lie on both sides of a cross-validation fold."""
        return normalise(self.topic or self.prompt)


def label_rows(side: str) -> list[Row]:
    """The human labels of one half. A refusal harms nobody, whatever was asked."""
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
    """Replies of the reference policy to benign prompts: harmless, helpful, no refusal."""
    return [
        Row(p.prompt, r, kind, harm=0.0, helpful=1.0, refusal=0.0, topic=topic(p))
        for p, r in zip(prompts, replies, strict=True)
        if r.strip()
    ]


def spoiled_rows(rows: Sequence[Row], vocabulary: Sequence[str], seed: int = 0) -> list[Row]:
    """Replies that must not be rewarded, made from the helpful `rows`: one of several ways for each row.

    Mismatched replies are fluent but answer another prompt, so only their pairing is wrong.
    """
    rng = random.Random(seed)
    good = [row for row in rows if row.helpful == 1.0]
    corruptions = _corruptions(vocabulary)
    spoiled = []
    for i, row in enumerate(good):
        other = rng.choice([r for r in good if r.group != row.group])
        spoiled.append(replace(row, reply=other.reply, kind="mismatched", harm=None, helpful=0.0, refusal=None))
        kind, corrupt = corruptions[i % len(corruptions)]
        harm = 0.0 if kind in ("refused", "stub", "empty", "random") else None
        refusal = 1.0 if kind == "refused" else None
        reply = corrupt(row, rng)
        spoiled.append(Row(row.prompt, reply, kind, harm=harm, helpful=0.0, refusal=refusal))
    return spoiled


def _corruptions(vocabulary: Sequence[str]) -> list[tuple[str, Callable[[Row, random.Random], str]]]:
    """Named ways to make a reply worthless; `vocabulary` holds token strings for the random one."""

    def shuffled(row: Row, rng: random.Random) -> str:
        words = row.reply.split()[:60]
        return " ".join(rng.sample(words, len(words)))

    def random_tokens(row: Row, rng: random.Random) -> str:
        return "".join(rng.choices(vocabulary, k=rng.randint(5, 40)))

    def repeated(row: Row, rng: random.Random) -> str:
        words = row.reply.split() or ["the"]
        start, width = rng.randrange(len(words)), rng.choice((1, 1, 2, 3, 5, 8))
        phrase = words[start : start + width]
        return " ".join(phrase * (40 // len(phrase)))

    def looped(row: Row, rng: random.Random) -> str:
        words = row.reply.split()
        keep = words[: rng.randint(4, 12)]
        return " ".join(keep + keep[-rng.choice((1, 2, 4)) :] * 12)

    return [
        ("shuffled", shuffled),
        ("random", random_tokens),
        ("repeated", repeated),
        ("looped", looped),
        ("echo", lambda row, rng: " ".join([row.prompt] * rng.choice((1, 1, 2)))),
        ("refused", lambda row, rng: rng.choice(REFUSALS)),
        ("stub", lambda row, rng: rng.choice(STUBS)),
        ("truncated", lambda row, rng: " ".join(row.reply.split()[: rng.randint(1, 3)])),
        ("empty", lambda row, rng: ""),
    ]


def reference_prompts(split: Split) -> list[Prompt]:
    """The training prompts whose sampled replies fix the units (the mix is in hash order already)."""
    return split.train[:REFERENCE_SAMPLES]


def sample_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seed: int,
    temperature: float = 1.0,
    batch: int = 32,
    done: Callable[[int], None] | None = None,
) -> list[str]:
    """One reply of the policy to each prompt: REPLY_TOKENS tokens, no truncation of the distribution."""
    torch.manual_seed(seed)
    replies = []
    for start in range(0, len(prompts), batch):
        chats = [[{"role": "user", "content": p.prompt}] for p in prompts[start : start + batch]]
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
