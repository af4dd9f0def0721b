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
