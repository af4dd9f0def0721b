"""Linear heads on frozen features: the row table, logistic regression on soft targets, grouped folds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import save_file

from .build import FITTED
from .rows import Row

LABELS_OF = {"harm": ("harm", "refusal"), "helpful": ("objective", "refusal"), "refusal": ("refusal",)}
"""Kinds of rows whose target comes straight from a human label."""

MADE_UP_WEIGHT, EVERYDAY_WEIGHT = 0.5, 2.0
"""Weights of rows that no human labelled, against 1 for one with a label. The repairs, and harm inferred from
"objective achieved", are many and at full weight cost ranking among the labelled ones; the everyday rows are
few, and at less weight harmless instructions score as harm."""


@dataclass(frozen=True)
class Head:
    """logit = x @ weight + bias, with the standardisation of x folded in."""

    weight: np.ndarray
    bias: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Probabilities (N,) of features (N, F)."""
        return 1 / (1 + np.exp(-(x @ self.weight + self.bias)))


@dataclass(frozen=True)
class Table:
    """Rows for one head: features at every cut (N, cuts, F), targets, weights (N, cuts) and prompt groups."""

    rows: list[Row]
    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    groups: np.ndarray

    def kinds(self) -> np.ndarray:
        """The kind of each row, (N,) of str."""
        return np.array([row.kind for row in self.rows])

    def lengths(self) -> np.ndarray:
        """Characters of each whole reply (N,)."""
        return np.array([len(row.reply) for row in self.rows])


def table(rows: Sequence[Row], x: np.ndarray, distinct: np.ndarray, target: str) -> Table:
    """Keep rows with this target. A row's weight is shared by the cuts that differ for it, `distinct`."""
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
    """Logistic regression on soft targets: each row counts as y positives and 1 - y negatives."""
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
    """A head on the rows `index` at all of their cuts."""
    weight = t.weight[index].ravel()
    used = weight > 0
    x = t.x[index].reshape(len(weight), -1)[used]
    return fit_head(x, np.repeat(t.y[index], t.x.shape[1])[used], weight[used], strength)


def out_of_fold(t: Table, strength: float) -> np.ndarray:
    """Predictions (N, cuts), each by a head that saw no row of the same prompt."""
    from sklearn.model_selection import GroupKFold

    predicted = np.zeros(t.x.shape[:2])
    for train, test in GroupKFold(5).split(t.y, groups=t.groups):
        head = fit_table(t, train, strength)
        predicted[test] = head(t.x[test])
    return predicted


def write_fitted(name: str, manifest: dict, arrays: dict) -> None:
    """Write the committed folder of one head: arrays in fp32, figures of the manifest to six digits."""
    folder = FITTED / name
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: torch.as_tensor(v, dtype=torch.float32).contiguous() for k, v in arrays.items()}
    save_file(tensors, folder / "heads.safetensors")
    rounded = json.loads(json.dumps(manifest), parse_float=lambda text: float(f"{float(text):.6g}"))
    (folder / "scorer.json").write_text(json.dumps(rounded, indent=2, ensure_ascii=False) + "\n")
