"""The backend in plain PyTorch: the definition that the other backends are tested against, and their fallback."""

from .dense import prepare
from .kernels import apply, fused, new_gradient, scale_rows, statistics, whole
from .reduction import reduce

__all__ = ["apply", "fused", "new_gradient", "prepare", "reduce", "scale_rows", "statistics", "whole"]
