"""The C++ backend, compiled from `csrc/` into `repo_kernels._cpu`.

The kernels exist for three instruction sets (AVX-512, AVX2 with FMA, and plain vectors); the best one that the machine
has is chosen at the first call. Each row of logits is read from memory once and its gradient is written past the
caches. The bits of a row depend neither on the number of threads (`torch.get_num_threads()`) nor on its neighbours.
"""

from .extension import available
from .losses import apply, fused, new_gradient, prepare, reduce, scale_rows, statistics, whole

__all__ = [
    "apply",
    "available",
    "fused",
    "new_gradient",
    "prepare",
    "reduce",
    "scale_rows",
    "statistics",
    "whole",
]
