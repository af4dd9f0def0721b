"""Make replies that must not be rewarded, for the reward head to learn (helpful 0)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from .rows import Row

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
STEPS = (
    "Begin with the first part.",
    "Prepare everything you need.",
    "Do what is needed.",
    "Check the outcome.",
    "Go on to the next part.",
    "Do it once more.",
    "Make sure that it works.",
    "Complete the task.",
    "Take your time.",
    "Choose the option that suits you.",
    "Think it over.",
    "Be careful.",
    "Move on.",
    "Look at the result.",
    "Adjust it if necessary.",
    "Finish the last part.",
    "Plan ahead.",
    "Get ready.",
    "Review your work.",
    "You are done.",
)
PROSE = (
    "This is a subject with many sides.",
    "Much of it depends on the situation.",
    "It is good to know the basics before you begin.",
    "Everyone has a different opinion about it.",
    "Some people prefer one way, and others prefer another.",
    "In general there are several possibilities.",
    "It is worth taking the time to understand it.",
    "There is more than one way to do it.",
    "In conclusion, it is up to you.",
    "As with everything, the details matter.",
    "You may find that one of them works for you.",
    "It is an important question that many people ask.",
    "Let us look at it more closely.",
    "Here are some things to keep in mind.",
)


def spoiled_rows(rows: Sequence[Row], vocabulary: Sequence[str], seed: int = 0) -> list[Row]:
    """Make replies that must not be rewarded from the helpful rows, two for each.

    One is the reply to another prompt, which is fluent and wrong only for its prompt. The other is a corrupted reply,
    in one of several ways that take turns.

    vocabulary: strings of tokens for random replies. seed: of the random choices.
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
    """List (kind, function that makes a worthless reply). vocabulary: strings of tokens for the random one."""

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


LONGEST_REPEATED = 48
"""Tokens of the longest reply that is repeated whole: two copies of it are at most the 96 tokens that heads read."""

EVERY = 4
"""One in this many helpful rows, and each everyday one, is repeated whole and answered with an empty form."""


def padded_rows(rows: Sequence[Row], count: Callable[[str], int], seed: int = 0) -> list[Row]:
    """Make two kinds of worthless length: a good reply said again two to four times, and a form without content.

    Nothing else tells the head that they are worthless, and it rewarded both.

    count: number of tokens of a reply. seed: of the random choices.
    """
    rng = random.Random(seed)
    padded = []
    for i, row in enumerate(row for row in rows if row.helpful == 1.0):
        if row.kind != "everyday" and i % EVERY:
            continue
        padded.append(Row(row.prompt, _empty_form(i, rng), "empty form", helpful=0.0, topic=row.topic))
        if (length := count(row.reply)) <= LONGEST_REPEATED:
            again = " ".join([row.reply] * rng.choice((2, 3, 4)))
            padded.append(Row(row.prompt, again, "again", helpful=0.0, topic=row.topic, since=length + length // 4))
    return padded


def _empty_form(i: int, rng: random.Random) -> str:
    """Make steps or prose that would fit any prompt. i: the number of the reply, by which the forms take turns."""
    count = rng.randint(3, 7)
    if i % 2:
        return " ".join(rng.sample(PROSE, count))
    number = ("Step {}: ", "{}. ", "{}) ")[i // 2 % 3]
    lead = ("", "Here is how: ", "Follow this guide. ")[i // 6 % 3]
    return lead + " ".join(number.format(k) + step for k, step in enumerate(rng.sample(STEPS, count), 1))
