"""What one of several processes does in test_processes.py whose last act is a collective, started by torchrun.

Its interpreter does not switch threads unless it sleeps or waits, and something holds the process group, as DTensor's
caches do: gloo's threads still have tensors to let go of when the work is done.
"""

import sys

import torch
import torch.distributed as dist

from repo.common.distributed import joined

if __name__ == "__main__":
    with joined(lambda: torch.device("cpu")):
        held = dist.group.WORLD
        sys.setswitchinterval(60)
        for _ in range(50):
            dist.all_reduce(torch.ones(3))
