"""Safety: which responses are safe, and {C - d}^+, of numbers, arrays and tensors.

A response is safe iff its cost C is at most the limit d. {C - d}^+ = max(C - d, 0) is computed per response and
averaged afterwards. Source: RePO, arXiv 2410.19933. The kernels of the losses compute C > d and {C - d}^+ themselves;
tests compare them with these definitions.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Values = TypeVar("Values", Tensor, NDArray[np.float64], float)


def round_limit(cost_limit: float) -> float:
    """Round d to fp32, the dtype of scores, so that a cost equal to d is safe in fp32 and fp64 alike."""
    return float(np.float32(cost_limit))


def is_safe(costs: Values, cost_limit: float) -> Any:
    """Tell whether C <= d. costs: a number, array or tensor of any shape. Returns bool of that shape."""
    return costs <= round_limit(cost_limit)


def rectified_cost(costs: Values, cost_limit: float) -> Values:
    """Compute {C - d}^+ of each cost, in the shape and dtype of `costs`. Rectify first; average afterwards."""
    excess = costs - round_limit(cost_limit)
    return excess.clamp_min(0) if isinstance(excess, Tensor) else np.maximum(excess, 0)
