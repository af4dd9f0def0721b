"""What a rehearsal changes in a process, so that a part runs on a CPU in seconds.

Triton's interpreter (TRITON_INTERPRET=1) runs ours and the peers' kernels; what has no CPU form is a row with a reason.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu.plan import Plan
from benchmarks.workloads.peers import missing


def rehearse(plan: Plan, part: str) -> None:
    """Trace graphs without compiling them, and run TRL's kernels where it takes PyTorch's operators on a CPU."""
    if not plan.rehearsal:
        return
    if not isinstance(torch.compile, functools.partial):
        torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
    if part == "linear" and not missing("trl"):
        from trl.kernels import chunked_logprob

        chunked_logprob._use_triton = lambda device: True
