"""A spread of the options and layouts of a loss, for what must hold with any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.kernels.cases import loss_arguments, make_batch

LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"leading": (3, 5)},
    "packed": {"lengths": [4, 0, 9]},
    "tokens": {"leading": (9,)},  # packed rows without bounds
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on-policy, no costs, no mask": {"on_policy": True, "cost_form": "none"},
    "hinge with baselines, k1": {"cost_form": "baselines", "reference": "k1", "beta": 0.1, "lam": 0.5},
    "split, per token, normalized": {
        "mode": "split", "cost_form": "given", "per_sequence": False, "lam": 2.0, "normalize": True, "cost_limit": 0.5,
    },
    "lagrangian, k2": {"mode": "lagrangian", "cost_form": "bare", "reference": "k2", "beta": 0.1, "lam": 1.0},
    "k3, entropy, importance weights, dual clip": {
        "reference": "k3", "beta": 0.3, "lam": 1.0, "entropy_coef": 0.1, "importance_weights": True, "dual_clip": 3.0,
        "grad_scale": 16.0,
    },
    "full KL, softcap, temperature": {"reference": "full", "beta": 0.2, "softcap": 8.0, "temperature": 0.7},
    "a temperature for each row": {"temperature": "rows", "reference": "k3", "beta": 0.1, "entropy_coef": 0.1},
    "full KL, a temperature for each sequence": {"temperature": "sequences", "reference": "full", "beta": 0.2},
    "entropy's value": {"return_entropy": True, "reference": "k3", "kl_importance_weighted": False, "beta": 0.1},
    "a limit for each sequence": {"lam": 1.0},
    "int32 ids": {"lam": 1.0},
    "scalars as tensors": {"reference": "k3", "loss_agg_mode": "token-mean"},
    "token sum": {"loss_agg_mode": "token-sum"},
    "sequence means": {"loss_agg_mode": "seq-mean-token-mean", "reference": "k3", "beta": 0.1, "lam": 1.0},
    "sequence sums": {"loss_agg_mode": "seq-mean-token-sum"},
    "sequence sums by length": {"loss_agg_mode": "seq-mean-token-sum-norm", "divisor": 7.5},
    "per-token losses": {"loss_agg_mode": "none", "reference": "k3", "beta": 0.1},
}  # fmt: skip
LOGPS_FIRST: dict[str, dict[str, Any]] = {
    "sequence ratio, k3, entropy": {
        "ratio_level": "sequence", "loss_agg_mode": "seq-mean-token-mean", "reference": "k3", "beta": 0.1, "lam": 1.0,
        "entropy_coef": 0.1,
    },
    "CISPO, importance weights": {
        "surrogate": "cispo", "importance_weights": True, "reference": "k3", "beta": 0.1, "lam": 1.0, "grad_scale": 4.0,
    },
    "CISPO of sequences, on-policy": {
        "surrogate": "cispo", "ratio_level": "sequence", "on_policy": True, "temperature": 0.7, "softcap": 8.0,
    },
    "sequence ratio, a temperature for each row": {
        "ratio_level": "sequence", "temperature": "rows", "entropy_coef": 0.1, "softcap": 8.0,
    },
}  # fmt: skip
"""Options whose loss is computed from log-probabilities, in two passes over the logits."""
SCALARS = {
    "lam": 0.5,
    "beta": 0.1,
    "eps_low": 0.2,
    "eps_high": 0.3,
    "temperature": 0.9,
    "entropy_coef": 0.05,
    "dual_clip": 3.0,
    "cost_limit": 0.25,
    "divisor": 7.0,
    "grad_scale": 2.0,
}
CALLS = [
    (layout, options)
    for layout in LAYOUTS
    for options in OPTIONS
    if layout != "tokens" or not OPTIONS[options].get("loss_agg_mode", "").startswith("seq")
]


def make_call(layout: str, options: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Any]]:
    """(logits, keyword arguments of repo_loss); dead rows hold NaN."""
    batch = make_batch(7, vocabulary=37, dtype=dtype, **LAYOUTS[layout])
    arguments = loss_arguments(batch, **(OPTIONS | LOGPS_FIRST)[options])
    if options == "on-policy, no costs, no mask":
        arguments["token_ids"] = arguments["token_ids"].masked_fill(batch.dead, -100)
        arguments["response_mask"] = None
    if options == "a limit for each sequence":
        arguments["cost_limit"] = batch.sequence_values(per_sequence=True)
    if options == "int32 ids":
        arguments["token_ids"] = arguments["token_ids"].int()
    if options == "scalars as tensors":
        arguments |= {name: torch.tensor(value) for name, value in SCALARS.items()}
    return batch.logits, arguments
