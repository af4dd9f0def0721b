"""The Triton backend: statistics, token terms and gradient of a row as device functions, and their launches."""

from .launch import apply, fused, new_gradient, scale_rows, statistics

__all__ = ["apply", "fused", "new_gradient", "scale_rows", "statistics"]
