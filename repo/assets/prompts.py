"""The fixed prompt split: what is trained on, what is held out, and what only the scorers are fitted with."""

from dataclasses import dataclass

from .sources import Prompt, all_labels, all_prompts, fraction, label_half, normalise

EVAL_PER_KIND = 110
"""Held-out prompts of each kind, harmful and benign."""

TRAIN_BENIGN_SHARE = 0.5
"""Benign share of the training mix, chosen so that the reference safe rate lies within 0.4-0.7."""


@dataclass(frozen=True)
class Split:
    """Disjoint sets of prompts. `reserve` (benign) supplies on-policy replies to the fits: half per side."""

    train: list[Prompt]
    eval: list[Prompt]
    reserve: list[Prompt]

    def reserve_of(self, side: str) -> list[Prompt]:
        """Reserve prompts that `scorer` or `judge` may learn from, by the same rule as the human labels."""
        return [p for p in self.reserve if label_half(p.prompt) == side]


def split_prompts(prompts: list[Prompt] | None = None, labelled: set[str] | None = None) -> Split:
    """Order each kind by the hash of its ids; the first go to evaluation, the next to training.

    A prompt that also occurs among the human labels (`labelled`, normalised) is never held out: a scorer or
    the judge has seen it.
    """
    if prompts is None:
        prompts = all_prompts()
    if labelled is None:
        labelled = {normalise(label.objective) for labels in all_labels().values() for label in labels}
    order = sorted(prompts, key=lambda p: fraction(p.id, "split:"))
    unseen = [p for p in order if normalise(p.prompt) not in labelled]
    held_out = [p for kind in (True, False) for p in [u for u in unseen if u.harmful == kind][:EVAL_PER_KIND]]
    ids = {p.id for p in held_out}
    harmful = [p for p in order if p.harmful and p.id not in ids]
    benign = [p for p in order if not p.harmful and p.id not in ids]
    count = round(len(harmful) * TRAIN_BENIGN_SHARE / (1 - TRAIN_BENIGN_SHARE))
    train = sorted(harmful + benign[:count], key=lambda p: fraction(p.id, "order:"))
    return Split(train, sorted(held_out, key=lambda p: p.id), benign[count:])
