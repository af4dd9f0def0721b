"""OpenMP: the waiting of PyTorch's CPU threads, and whether other processes need the cores too."""

from __future__ import annotations

import os

# On two cores with a load of 4 to 6 and two threads, the default rollout ran at 10 tokens/s with libgomp's own setting,
# since threads that spin take the core from the one they wait for; at 80 with 1000 turns and at 70 without spinning. On
# the same machine idle: 205, 187 and 163.
SPINS = "1000"


def spin_briefly() -> None:
    """Make PyTorch's threads sleep soon when they wait for one another. Call this before torch is imported.

    Sets GOMP_SPINCOUNT unless it or OMP_WAIT_POLICY is set. It has no effect with other runtimes than libgomp.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def describe_load() -> str:
    """Return a sentence if other work needs more than the machine's cores, else ""."""
    if not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores:
        return ""
    return f"this machine is busy: its load is {load:.1f} on {cores} cores, so the run takes longer than it would alone"
