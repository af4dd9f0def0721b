"""The backend in plain PyTorch: the definition that the other backends are tested against, and their fallback."""

from .kernels import apply, fused, new_gradient, scale_rows, statistics

__all__ = ["apply", "fused", "new_gradient", "scale_rows", "statistics"]
