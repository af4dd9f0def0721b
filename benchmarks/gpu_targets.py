"""What the kernels are compiled for, and what such a machine holds, issues and moves.

A unit is a streaming multiprocessor (NVIDIA) or a compute unit (AMD); a program is a block or a work-group, a warp is
32 or 64 threads. Both makers divide a unit into four partitions, each with its own registers and warps, and grant
registers to a thread by the eight.

Sources. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (threads, blocks,
registers, shared memory) and "Arithmetic Instructions" (16 results of a special function per clock and SM in 8.0, 9.0
and 10.0; for 10.0 also the FlashAttention-4 paper: unchanged since Hopper); rounding of registers and of shared memory
as in cuda_occupancy.h. Data sheets: A100 80 GB SXM (108 SMs, 1.41 GHz, 2.039 TB/s, 40 MB of L2), H100 SXM (132, 3.35
TB/s, 50 MB), B200 (8 TB/s; 148 SMs and 126 MB by chipsandcheese.com; 1.85 GHz is what its 2.25 PFLOP/s of dense bf16
say, 8192 a clock and SM). AMD: MI300X data sheet (304 CUs, 2.1 GHz, 5.3 TB/s); ROCm "GPU hardware specifications"
(gfx942: 512 KB of vector and 12.5 KB of scalar registers and 64 KB of LDS a CU, 4 MB of L2 for each of 8 XCDs, 256 MB
of Infinity Cache); ROCm Compute Profiler "Pipeline descriptions" (four SIMDs 16 lanes wide, so that a CU issues one
vector instruction of 64 threads a clock; 8 wavefronts each); LLVM's SISchedule.td (transcendentals at a quarter of that
rate) and AMDGPUBaseInfo.cpp (registers granted by 8 vector and 16 scalar ones, LDS by 512 bytes). The wavefronts that
registers allow are those that LLVM prints ("; Occupancy") in the assembly of every kernel here.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTITIONS = 4
REGISTER_UNIT = 8
SCALAR_UNIT, TRAP_SCALARS = 16, 16  # AMD: granted to a warp by so many, beside those of the trap handler


@dataclass(frozen=True)
class Machine:
    """A GPU. registers: 32-bit ones of a partition. shared, reserved, shared_unit: bytes a unit has for its programs,
    takes for each of them, and grants at a time. issue: instructions (of a whole warp) a clock and unit. mufu: results
    of special functions a clock and unit. clock: Hz. dram: bytes/s. l2: MB of a cache that all units share, None where
    there is no such cache. scalars: scalar registers of a partition, where warps have some of their own."""

    device: str
    backend: str
    architecture: int | str
    warp_size: int
    units: int
    warps: int
    programs: int
    registers: int
    shared: int
    reserved: int
    shared_unit: int
    issue: int
    mufu: int
    clock: float
    dram: float
    l2: int | None
    scalars: int = 0

    def resident(self, warps: int, registers: int, shared: int, scalars: int = 0) -> int:
        """Programs that a unit holds at a time: of so many warps, registers of a thread, bytes of shared memory and
        scalar registers of a warp. 0: one alone does not fit."""
        granted = -(-max(registers, 1) // REGISTER_UNIT) * REGISTER_UNIT * self.warp_size
        held = min(self.warps // PARTITIONS, self.registers // granted)
        if self.scalars and scalars:
            held = min(held, self.scalars // (-(-(scalars + TRAP_SCALARS) // SCALAR_UNIT) * SCALAR_UNIT))
        memory = -(-(shared + self.reserved) // self.shared_unit) * self.shared_unit
        fitting = self.shared // memory if memory else self.programs
        return min(held * PARTITIONS // warps, self.warps // warps, fitting, self.programs)


def _nvidia(device: str, architecture: int, units: int, shared: int, clock: float, dram: float, l2: int) -> Machine:
    return Machine(
        device,
        "cuda",
        architecture,
        warp_size=32,
        units=units,
        warps=64,
        programs=32,
        registers=65536 // PARTITIONS,
        shared=shared * 1024,
        reserved=1024,
        shared_unit=128,
        issue=4,
        mufu=16,
        clock=clock,
        dram=dram,
        l2=l2,
    )


TARGETS: dict[str, Machine] = {
    "sm_80": _nvidia("A100 80 GB", 80, 108, 164, 1.41e9, 2.039e12, 40),
    "sm_90": _nvidia("H100", 90, 132, 228, 1.755e9, 3.35e12, 50),
    "sm_100": _nvidia("B200", 100, 148, 228, 1.85e9, 8e12, 126),
    "gfx942": Machine(
        "MI300X",
        "hip",
        "gfx942",
        warp_size=64,
        units=304,
        warps=32,
        programs=32,
        registers=512 * 64,
        shared=64 * 1024,
        reserved=0,
        shared_unit=512,
        issue=1,
        mufu=16,
        clock=2.1e9,
        dram=5.3e12,
        l2=None,
        scalars=800,
    ),
}
