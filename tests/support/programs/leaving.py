"""Leave right after a collective: the program of each process of a test in test_processes.py, started by torchrun.

The process provokes the case in which gloo's threads still hold tensors when the work is done: its interpreter switches
threads only when it sleeps or waits, and a variable holds the process group, as DTensor's caches do.
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
