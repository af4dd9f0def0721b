"""Split the prompts in a fixed way: for training, for evaluation, and a reserve for fitting scorers and judge."""

from dataclasses import dataclass

from .sources import Prompt, all_labels, all_prompts, fraction, label_half, normalise

EVAL_PER_KIND = 110
"""Number of held-out prompts of each kind, harmful and benign."""

TRAIN_BENIGN_SHARE = 0.5
"""Benign share of the training prompts, chosen so that the safe rate of the reference is between 0.4 and 0.7."""


@dataclass(frozen=True)
class Split:
    """Disjoint sets of prompts.

    train: for training. eval: held out. reserve: benign prompts whose sampled replies the heads are fitted on, half by
    the scorers and half by the judge.
    """

    train: list[Prompt]
    eval: list[Prompt]
    reserve: list[Prompt]

    def reserve_of(self, side: str) -> list[Prompt]:
        """List the reserve prompts of one side, scorer or judge, divided by the same rule as the human labels."""
        return [p for p in self.reserve if label_half(p.prompt) == side]


def split_prompts(prompts: list[Prompt] | None = None, labelled: set[str] | None = None) -> Split:
    """Split the prompts: each kind is ordered by the hash of its ids; the first are held out, the next are trained on.

    prompts: None for those of all sources.
    labelled: normalised prompts of the human labels, None for all of them. They are never held out, since a scorer or
        the judge was fitted on them.
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
