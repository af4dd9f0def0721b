"""Scaled updates: a policy between the model that training began with and the trained one, or a little beyond it.

theta_alpha = theta_ref + alpha (theta - theta_ref). The difference is the task vector of arXiv 2212.04089.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..common.errors import UserError

LARGEST = 1.5
"""Largest alpha: beyond it weights are far from any that training has tried."""
FROZEN_FACTOR = ".lora_A."
"""Part of the name of the factor of an adapter that is not scaled, because its product must be scaled once."""


def require_scale(scale: float, where: str) -> float:
    """Return a scale in (0, LARGEST]. where: the argument, for the message. Raises UserError for other numbers."""
    if not (math.isfinite(scale) and 0 < scale <= LARGEST):
        raise UserError(f"{where} must be > 0 and <= {LARGEST:g}; got {scale:g}")
    return scale


def trained_copies(model: Any) -> dict[str, Tensor]:
    """Copy the parameters that are trained, by name; tied parameters occur once."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def scale_update(model: Any, begun: Mapping[str, Tensor], scale: float) -> None:
    """Replace each trained parameter theta by begun + scale (theta - begun), in place.

    It is computed in fp64 and rounded once to the parameter's dtype. Of LoRA adapters, whose product begins as 0, only
    the factor B is scaled, and the product B A with it.

    begun: name -> trained parameter at the start, as trained_copies returns it. scale: alpha.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and FROZEN_FACTOR not in name:
            start = begun[name].double()
            parameter.copy_(start + scale * (parameter.double() - start))


def require_share(keep: float, where: str) -> float:
    """Return a share in (0, 1]. where: the argument, for the message. Raises UserError for other numbers."""
    if not (math.isfinite(keep) and 0 < keep <= 1):
        raise UserError(f"{where} must be > 0 and <= 1; got {keep:g}")
    return keep


@torch.no_grad()
def patch(
    model: Any, trained: Mapping[str, Tensor], gradient: Mapping[str, Tensor], scale: float, keep: float
) -> float:
    """Add scale times the most important entries of an update to the model that training began with, in place.

    An entry's importance is |delta * gradient|, the change of the cost by that entry alone to first order. The share
    `keep` of all entries with the largest importance is added; entries at the threshold are added all, those of
    importance 0 never. After SafePatching, arXiv 2405.13820, of which only the abstract was read.

    model: with the weights theta_ref. trained: name -> theta of each trained parameter. gradient: name -> dE[C]/d theta
    at theta_ref. scale: alpha. keep: in (0, 1].

    Returns the share of entries that were added.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    importance = {name: ((trained[name] - p) * gradient[name]).abs() for name, p in parameters.items()}
    flat = torch.cat([values.flatten() for values in importance.values()])
    count = max(1, round(keep * len(flat)))
    threshold, added = flat.kthvalue(len(flat) - count + 1).values, 0
    for name, parameter in parameters.items():
        kept = (importance[name] >= threshold) & (importance[name] > 0)
        start = parameter.double()
        moved = start + scale * (trained[name].double() - start)
        parameter.copy_(torch.where(kept, moved, start))
        added += int(kept.sum())
    return added / len(flat)
