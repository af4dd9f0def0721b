"""The Triton backend: statistics, token terms and gradient of a row as device functions, and their launches."""

from .launch import apply, fused, new_gradient, prepare, reduce, scale_rows, statistics, whole

__all__ = ["apply", "fused", "new_gradient", "prepare", "reduce", "scale_rows", "statistics", "whole"]
