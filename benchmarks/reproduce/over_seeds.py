"""Quantities over several seeds: means with intervals that know of prompts and of seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from repo.evaluation.statistics import QUANTITIES, Array, Evaluation, interval_of, resampled_of
from repo.scoring.safety import TITLES

Interval = dict[str, float | None]
"""{"mean", "low", "high"}."""


@dataclass(frozen=True)
class Seeds:
    """A quantity of a method.

    values: of each seed, (S,). resampled: of each seed's resampled prompts, (S, RESAMPLES).
    """

    values: Array
    resampled: Array

    def draws(self, stream: int = 0) -> Array:
        """Draw the mean over seeds: resampled prompts plus Student's t for the spread of the seeds.

        With one seed the spread of seeds is unknown and left out.

        Args:
            stream: number of the random stream; different streams are independent.

        Returns:
            (RESAMPLES,) draws.
        """
        seeds, resamples = self.resampled.shape
        means = self.resampled.mean(0)
        if seeds > 1:
            error = self.values.std(ddof=1) / np.sqrt(seeds)
            means = means + error * np.random.default_rng(stream).standard_t(seeds - 1, resamples)
        return means

    @property
    def interval(self) -> Interval:
        """Return mean and 95 % interval over seeds and prompts."""
        return interval_of(float(self.values.mean()), self.draws())

    def minus(self, other: Seeds) -> Interval:
        """Return the difference with its interval: both sides draw the same prompts, and seeds independently."""
        return interval_of(float(self.values.mean() - other.values.mean()), self.draws(1) - other.draws(2))


def of_seeds(evaluations: Sequence[Evaluation], key: str) -> Seeds:
    """Compute a quantity from the evaluations of a method's seeds, all on the same prompts."""
    columns = [evaluation.columns for evaluation in evaluations]
    values = np.array([float(QUANTITIES[key](c)) for c in columns])
    return Seeds(values, np.stack([resampled_of(key, c) for c in columns]))


def change_of_seeds(pairs: Sequence[tuple[Evaluation, Evaluation]], key: str) -> Seeds:
    """Compute after - before of a quantity, prompt by prompt, for each seed; all seeds have the same prompts."""
    before, after = (of_seeds(side, key) for side in zip(*pairs, strict=True))
    return Seeds(after.values - before.values, after.resampled - before.resampled)


def ratio_of_seeds(pairs: Sequence[tuple[Evaluation, Evaluation]], key: str) -> Seeds:
    """Compute after / before of a quantity, prompt by prompt, for each seed; all seeds have the same prompts."""
    before, after = (of_seeds(side, key) for side in zip(*pairs, strict=True))
    return Seeds(after.values / before.values, after.resampled / before.resampled)


def within(key: str, value: Interval) -> Interval:
    """Cut the interval of a share to [0, 1], which Student's t may leave."""
    if not TITLES[key].form.endswith("%}"):
        return value
    return {end: None if v is None else min(max(v, 0.0), 1.0) for end, v in value.items()}
