"""Triton backend: statistics, token terms and gradient as device functions, and their launches (see rows.py)."""

from .launch import apply, fused, new_gradient, scale_rows, statistics

__all__ = ["apply", "fused", "new_gradient", "scale_rows", "statistics"]
