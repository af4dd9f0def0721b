"""How many programs of a kernel a multiprocessor (on AMD a compute unit) holds at once."""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULERS = 4  # of a multiprocessor, each with registers of its own; a program's warps are dealt out evenly
LANE_REGISTERS = 512  # of a scheduler, 32 bits each, for each of its 32 or 64 lanes
GRANULE = 8  # a thread's registers are rounded up to a multiple of it


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of a multiprocessor.

    Args:
        warps: of a scheduler.
        shared_bytes: of all its programs.
        reserved_bytes: of the shared memory, taken from every program.
    """

    warps: int
    shared_bytes: int
    reserved_bytes: int


# CUDA C++ Programming Guide, "Compute Capabilities" (sm_80, sm_90, sm_100); CDNA 3 ISA reference (gfx942).
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(16, 164 << 10, 1 << 10),
    "sm_90": Multiprocessor(16, 228 << 10, 1 << 10),
    "sm_100": Multiprocessor(16, 228 << 10, 1 << 10),
    "gfx942": Multiprocessor(8, 64 << 10, 0),
}


def programs(target: str, num_warps: int, registers: int, shared_bytes: int) -> int:
    """Return the number of programs that fit a multiprocessor.

    Args:
        target: key of MULTIPROCESSORS.
        num_warps: of a program.
        registers: of a thread.
        shared_bytes: of a program.
    """
    limits = MULTIPROCESSORS[target]
    taken = -(-max(registers, 1) // GRANULE) * GRANULE
    warps = SCHEDULERS * min(limits.warps, LANE_REGISTERS // taken)
    shared = shared_bytes + limits.reserved_bytes
    return min(warps // num_warps, limits.shared_bytes // shared if shared else warps)
