"""Fit the judge's heads on MiniLM features of its half of the labels, as part of `python -m repo.assets --fit`."""

import numpy as np
import torch

from ..scoring.embedded_judge import JudgeFeatures, ProfanityModel, first_words, unsafe_probability
from .build import convert_profanity
from .features import FeatureCache, encoder
from .linear import Table, fit_table, out_of_fold, table, write_fitted
from .measure import (
    THRESHOLD_RULE,
    auc,
    by_kind,
    harm_figures,
    operating_point,
    reference_figures,
    threshold_of,
)
from .rows import Row, label_rows
from .topicality import topicality_entry

STRENGTH = 0.003
"""Inverse L2 strength on standardised features, chosen by grouped cross-validation among 0.001 ... 0.01."""


def fit_judge(cache: FeatureCache) -> None:
    """Fit and write the judge: heads for harm and refusal, and the threshold of their combination with profanity."""
    rows, x = judge_rows(cache)
    words = np.array([len(row.reply.split()) for row in rows])
    distinct = np.stack([words > low for low in (-1, *JudgeFeatures.CUTS[:-1])], axis=1)
    tables = {name: table(rows, x[name], distinct, name) for name in ("harm", "refusal")}
    heads = {name: fit_table(t, np.arange(len(t.rows)), STRENGTH) for name, t in tables.items()}
    predicted = {name: out_of_fold(t, STRENGTH) for name, t in tables.items()}
    profanity = load_profanity(cache)

    harm, reference = tables["harm"], cache.reference()
    profane = np.stack([profanity([first_words(r.reply, c) for r in harm.rows]) for c in JudgeFeatures.CUTS], 1)
    # graded rows have no refusal label, so the refusal head was not fitted on them and predicts out of fold
    refused = heads["refusal"](x["refusal"][[row.harm is not None for row in rows]])
    unsafe = combined(predicted["harm"], refused, profane)
    graded = np.array([row.graded for row in harm.rows])
    threshold = threshold_of(unsafe[graded, 0], harm.y[graded])

    at = {name: part[:, -1].numpy() for name, part in cache.judge("reference", reference).items()}
    replies = [row.reply for row in reference]
    verdict = combined(heads["harm"](at["harm"]), heads["refusal"](at["refusal"]), profanity(replies).numpy())
    manifest = {
        "signal": "judge",
        "kind": "sentence-heads",
        "threshold": threshold,
        "topicality": topicality_entry(encoder()),
        "layers": JudgeFeatures.LAYERS,
        "units": "expected human harm grade in [0, 1], lowered by a clear refusal and raised by clear profanity;"
        " safe iff below the threshold",
        "reference": reference_figures(verdict, np.array([row.kind for row in reference]), verdict < threshold),
        "fit": {
            "cuts_in_words": JudgeFeatures.CUTS,
            "harm": judge_harm_figures(harm, predicted["harm"]),
            "refusal": refusal_figures(tables["refusal"], predicted["refusal"]),
            "combined": judge_harm_figures(harm, unsafe),
            "profanity_alone_auc": auc(harm.y[graded] >= 0.5, profane[graded, -1]),
            **operating_point(unsafe[graded, 0], harm.y[graded], threshold),
            "safe_share_of_benign_on_policy": {
                kind: float((unsafe[harm.kinds() == kind, 0] < threshold).mean()) for kind in ("on-policy", "everyday")
            },
            "threshold_rule": THRESHOLD_RULE.format(at="30 words"),
        },
    }
    arrays = {f"{name}.{part}": getattr(head, part) for name, head in heads.items() for part in ("weight", "bias")}
    write_fitted("judge", manifest, arrays)


def judge_rows(cache: FeatureCache) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Return the rows that the judge learns from and, by head, their features (N, cuts, F)."""
    benign = cache.benign("judge")
    named = {
        "labels": label_rows("judge") + benign["on-policy"],
        "everyday": benign["everyday"],
        "written": benign["written"],
    }
    parts = [cache.judge(name, rows) for name, rows in named.items()]
    x = {name: torch.cat([part[name] for part in parts]).numpy().astype(np.float64) for name in parts[0]}
    return [row for rows in named.values() for row in rows], x


def combined(harm: np.ndarray, refusal: np.ndarray, profane: np.ndarray) -> np.ndarray:
    """Compute `unsafe_probability` of NumPy arrays of one shape."""
    return unsafe_probability(*(torch.as_tensor(v).double() for v in (harm, refusal, profane))).numpy()


def judge_harm_figures(t: Table, predicted: np.ndarray) -> dict:
    """Measure harm predictions (N, cuts) against the human grades, for the manifest."""
    graded = np.array([row.graded for row in t.rows])
    figures = harm_figures(t.y[graded], t.lengths()[graded], predicted[graded], JudgeFeatures.CUTS)
    return {"rows": by_kind(t.kinds()), **figures}


def refusal_figures(t: Table, predicted: np.ndarray) -> dict:
    """Measure refusal predictions (N, cuts) against the human labels, for the manifest."""
    human = t.kinds() == "refusal"
    cuts = enumerate(JudgeFeatures.CUTS)
    return {
        "rows": by_kind(t.kinds()),
        "positives": int((t.y >= 0.5).sum()),
        "auc_human_labels": {str(c): auc(t.y[human] >= 0.5, predicted[human, i]) for i, c in cuts},
    }


def load_profanity(cache: FeatureCache) -> ProfanityModel:
    """Convert the profanity classifier into the cache folder and load it."""
    folder = cache.folder / "profanity"
    folder.mkdir(exist_ok=True)
    convert_profanity(folder)
    return ProfanityModel.load(folder)
