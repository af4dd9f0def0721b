"""Fit linear heads on frozen features by logistic regression on soft targets, and predict rows out of fold."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file

from .build import FITTED
from .rows import Row

LABELS_OF = {"harm": ("harm", "refusal"), "helpful": ("objective", "refusal"), "refusal": ("refusal",)}
"""Head -> kinds of rows whose target is a human label."""

MADE_UP_WEIGHT, EVERYDAY_WEIGHT = 0.5, 2.0
"""Weights of rows without a human label; a row with one has weight 1.

There are many made-up replies, and many rows whose harm is inferred from "objective achieved": with weight 1 the heads
rank the labelled rows less well. There are few everyday rows: with a lower weight harmless instructions score as harm.
"""


@dataclass(frozen=True)
class Head:
    """Linear head: logit = x @ weight + bias, with the standardisation of x folded in. weight: (F,)."""

    weight: np.ndarray
    bias: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Compute probabilities (...) from features (..., F)."""
        return 1 / (1 + np.exp(-(x @ self.weight + self.bias)))


@dataclass(frozen=True)
class Table:
    """N rows that one head is fitted on.

    rows: the pairs of prompt and reply. x: (N, cuts, F) features at every cut. y: (N,) targets in [0, 1].
    weight: (N, cuts) weights. groups: (N,) int, equal for rows that must stay in one fold.
    """

    rows: list[Row]
    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    groups: np.ndarray

    def kinds(self) -> np.ndarray:
        """Return the kind of each row, (N,) of str."""
        return np.array([row.kind for row in self.rows])

    def lengths(self) -> np.ndarray:
        """Return the number of characters of each whole reply, (N,)."""
        return np.array([len(row.reply) for row in self.rows])


def table(rows: Sequence[Row], x: np.ndarray, distinct: np.ndarray, target: str) -> Table:
    """Make the table of the rows that have a target.

    x: (N, cuts, F) features. distinct: (N, cuts) bool, the cuts among which a row's weight is divided, since at the
    others its text is the same or is not used. target: harm, helpful or refusal.
    """
    keep = np.array([getattr(row, target) is not None for row in rows])
    kept = [row for row, k in zip(rows, keep, strict=True) if k]
    weights = dict.fromkeys(LABELS_OF[target], 1.0) | {"everyday": EVERYDAY_WEIGHT}
    weight = np.array([weights.get(row.kind, MADE_UP_WEIGHT) for row in kept])
    share = distinct[keep] / distinct[keep].sum(1, keepdims=True)
    names = {name: i for i, name in enumerate(sorted({row.group for row in kept}))}
    return Table(
        kept,
        x[keep],
        np.array([getattr(row, target) for row in kept], dtype=float),
        share * weight[:, None],
        np.array([names[row.group] for row in kept]),
    )


def fit_head(x: np.ndarray, y: np.ndarray, weight: np.ndarray, strength: float) -> Head:
    """Fit a logistic regression on soft targets: each row counts as y positives and 1 - y negatives.

    x: (N, F). y, weight: (N,). strength: inverse L2 strength on standardised features.
    """
    from sklearn.linear_model import LogisticRegression

    mean, std = np.average(x, 0, weight), x.std(0) + 1e-6
    z = (x - mean) / std
    doubled, side = np.concatenate([z, z]), np.repeat([1, 0], len(z))
    counts = np.concatenate([y * weight, (1 - y) * weight])
    used = counts > 0
    model = LogisticRegression(C=strength, max_iter=3000).fit(doubled[used], side[used], counts[used])
    folded = model.coef_[0] / std
    return Head(folded, float(model.intercept_[0] - mean @ folded))


def fit_table(t: Table, index: np.ndarray, strength: float) -> Head:
    """Fit a head on some rows at all their cuts. index: (n,) row numbers. strength: inverse L2 strength."""
    weight = t.weight[index].ravel()
    used = weight > 0
    x = t.x[index].reshape(len(weight), -1)[used]
    return fit_head(x, np.repeat(t.y[index], t.x.shape[1])[used], weight[used], strength)


def out_of_fold(t: Table, strength: float) -> np.ndarray:
    """Predict every row, (N, cuts), with a head fitted on the folds without rows of the same prompt."""
    from sklearn.model_selection import GroupKFold

    predicted = np.zeros(t.x.shape[:2])
    for train, test in GroupKFold(5).split(t.y, groups=t.groups):
        head = fit_table(t, train, strength)
        predicted[test] = head(t.x[test])
    return predicted


def write_fitted(name: str, manifest: dict, arrays: dict) -> None:
    """Write the committed folder of a head: arrays in fp32, and the manifest with numbers rounded to six digits.

    name: reward, cost or judge.
    """
    folder = FITTED / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: torch.as_tensor(v, dtype=torch.float32).contiguous() for k, v in arrays.items()}
    save_file(tensors, folder / "heads.safetensors")
    rounded = json.loads(json.dumps(manifest), parse_float=lambda text: float(f"{float(text):.6g}"))
    (folder / "scorer.json").write_text(json.dumps(rounded, indent=2, ensure_ascii=False) + "\n")
