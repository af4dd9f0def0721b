"""Triton's interpreter for the tests of the benchmarks, set before any of them defines the kernels."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
