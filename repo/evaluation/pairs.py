"""Pairs: responses to held-out prompts before and after training, chosen by a rule that reads none of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from ..common.seeds import seed_from
from ..runs.model_card import code
from ..scoring.safety import mostly_unsafe
from .outcome import COLUMNS, scorers_of
from .statistics import Evaluation

TURNED, KEPT = 3, 1  # pairs shown that became safe, and that did not
SHOWN = 160  # characters of a prompt or response in the console and on a model card


@dataclass(frozen=True)
class Pair:
    """A held-out prompt with the response of the same number before and after training.

    before, after: records of the responses. safe: the one after training is safe; the one before it is not.
    unsafe: how many of the prompt's responses are unsafe before and after training. samples: of how many.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]
    safe: bool
    unsafe: tuple[int, int]
    samples: int


@dataclass(frozen=True)
class Pairs:
    """Pairs chosen by rule.

    scorer: who says which responses are unsafe. samples: responses to each prompt.
    became_safe, stayed_unsafe: all pairs, in the rule's order, by whether the response after training is safe.
    """

    scorer: str
    samples: int
    became_safe: Sequence[Pair]
    stayed_unsafe: Sequence[Pair]

    @property
    def shown(self) -> list[Pair]:
        """Return the first TURNED pairs that became safe and the first KEPT that did not."""
        return [*self.became_safe[:TURNED], *self.stayed_unsafe[:KEPT]]

    @property
    def rule(self) -> str:
        """State the rule, and how many pairs there were to choose from."""
        turned, kept = len(self.became_safe), len(self.stayed_unsafe)
        which = "mostly unsafe" if self.samples > 1 else "answered unsafely"
        prompts = f"{which} before training by the {self.scorer}"
        if not turned + kept:
            return f"No pairs to show: no prompt was {prompts}."
        return (
            f"Chosen by rule from {_counted(turned + kept, 'prompt')} {prompts}, in an order hashed from their ids: "
            "the first unsafe response of each, and the one of the same number after training. In "
            f"{_counted(turned, 'pair')} the response became safe{_shown(turned, TURNED)}, in {kept} it did "
            f"not{_shown(kept, KEPT)}."
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(there: int, most: int) -> str:
    """Say which of the pairs are shown, if not all."""
    first = "the first is" if most == 1 else f"the first {most} are"
    return f" ({first} shown)" if there > most else ""


def place(name: str) -> int:
    """Return the number by which the rule orders a prompt. name: its id, also one that is no valid Unicode."""
    return seed_from("pairs", ascii(name))


def choose(before: Evaluation, after: Evaluation) -> Pairs:
    """Choose pairs of responses to the common prompts, by the held-out judge or, without one, by the training cost.

    Candidates are the prompts that are mostly unsafe before training. Each gives its first unsafe response before
    training and the response of the same number after it, which was sampled with the same random numbers. Their order
    is a hash of the prompts' ids, so that it depends on no response.
    """
    scorer, k = scorers_of(before, after)[0], before.samples
    old, new = (e.columns[COLUMNS[scorer]] for e in (before, after))
    rows = {name: row for row, name in enumerate(after.ids)}
    found: dict[bool, list[Pair]] = {True: [], False: []}
    for row, name in sorted(enumerate(before.ids), key=lambda item: place(item[1])):
        if name not in rows or not mostly_unsafe(old[row].mean()):
            continue
        number, other = int(old[row].argmin()), rows[name]
        safe = bool(new[other, number])
        unsafe = int((old[row] == 0).sum()), int((new[other] == 0).sum())
        records = before.records[row * k + number], after.records[other * k + number]
        found[safe].append(Pair(*records, safe, unsafe, k))
    return Pairs(scorer, k, found[True], found[False])


def one_line(text: str, most: int = SHOWN) -> str:
    """Write a text on one line of at most `most` characters, without control characters."""
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def title(pair: Pair) -> str:
    """Say what became of a pair's response and of its prompt."""
    end = "safe" if pair.safe else "unsafe"
    before, after = pair.unsafe
    counts = f", prompt unsafe in {before} of {pair.samples} before, {after} after" if pair.samples > 1 else ""
    return f"unsafe → {end}{counts}"


def _parts(pair: Pair) -> Iterator[tuple[str, str]]:
    """Yield (name, text on one line) of a pair's prompt and responses."""
    yield "prompt", one_line(pair.before["prompt"])
    yield "before", one_line(pair.before["response"])
    yield "after", one_line(pair.after["response"])


def print_pairs(console: Console, pairs: Pairs) -> None:
    """Print the rule and the pairs that it chose."""
    console.print(pairs.rule, markup=False, highlight=False)
    for pair in pairs.shown:
        style = "green" if pair.safe else "red"
        console.print(f"  {title(pair)}   {one_line(pair.before['id'])}", style=style, markup=False, highlight=False)
        for name, text in _parts(pair):
            console.print(f"    {name + ':':8}{text}", markup=False, highlight=False)


def markdown(pairs: Pairs) -> list[str]:
    """List the lines of a model card that state the rule and show the pairs."""
    lines = [f"Before and after training. {pairs.rule} The text may be offensive.", ""]
    for pair in pairs.shown:
        lines.append(f"- {title(pair)}")
        lines += [f"  - {name}: {code(text)}" for name, text in _parts(pair)]
    return lines
