"""What is known of one compiled kernel on one target: counts from its machine code, and what they say of its speed.

Counts are read; times are *modelled* (gpu_targets.py has the rates).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .gpu_targets import TARGETS, Machine
from benchmarks.compiled.machine_code import Region

ITEM_SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_WIDTH = 16
EXAMPLE_VOCABULARY = 151936  # spreads the instructions outside the loops over a row


@dataclass
class StaticReport:
    """One kernel on one target.

    loops: innermost loops in program order. outside: the rest of the kernel. path: the longest path through that rest.
    reason: why the kernel (of a peer) could not be compiled; all figures are then zero.
    passes: over the logits that one launch of a peer's kernel must make (0: as the kind says).
    hidden, bytes_per_logit: of a kernel that multiplies matrices, the length of the dot products, and the bytes that
    each of its loops loads for a logit of the program's tile (elements_per_thread x threads logits).
    """

    name: str
    kind: str
    dtype: str
    target: str
    num_warps: int
    elements_per_thread: float
    entropy: int = 0
    softcap: bool = False
    full_kl: bool = False
    registers: int = 0
    scalars: int = 0  # AMD: scalar registers of a warp
    spills: int = 0  # spill instructions, and on AMD the spilled vector registers
    lane_copies: int = 0  # AMD: scalar registers that are kept in lanes of a vector register, not in memory
    local_bytes: int = 0  # local memory, stack or scratch
    shared_bytes: int = 0
    passes: int = 0
    hidden: int = 0
    bytes_per_logit: float = 0.0
    reason: str = ""
    seconds: float = 0.0  # to compile and to read
    loops: list[Region] = field(default_factory=list)
    outside: Region = field(default_factory=Region)
    path: Region = field(default_factory=Region)

    @property
    def machine(self) -> Machine:
        """What it is compiled for."""
        return TARGETS[self.target]

    @property
    def threads(self) -> int:
        """In a program."""
        return self.num_warps * self.machine.warp_size

    @property
    def plain(self) -> bool:
        """Neither softcap nor full KL."""
        return not (self.softcap or self.full_kl)

    @property
    def sweeps(self) -> list[Region]:
        """Loops over the bulk of a row, or over matrices. Where there are others, masked ones take the few blocks that
        are not whole; those that only write fill dead rows with zeros; one after its unrolled form takes the last
        trips."""
        reading = [loop for loop in self.loops if loop.loads]
        if self.hidden:
            return reading
        bulk = [loop for loop in reading if not loop.masked] or reading
        return [loop for i, loop in enumerate(bulk) if i == 0 or not self._is_remainder(loop, bulk[i - 1])]

    def _is_remainder(self, loop: Region, before: Region) -> bool:
        times, rest = divmod(before.bytes_loaded(), loop.bytes_loaded())
        return times > 1 and rest == 0 and before.bytes_stored() == times * loop.bytes_stored()

    def elements(self, loop: Region) -> float:
        """Logits that a thread takes in one trip, from the bytes it loads (compilers may unroll)."""
        return loop.bytes_loaded() / (self.bytes_per_logit or ITEM_SIZE[self.dtype] * (2 if self.full_kl else 1))

    def per_logit(self, what: str = "instructions") -> list[float]:
        """Instructions (or "mufu") per logit: of each sweep, or of the longest path where nothing is swept."""
        if self.sweeps:
            return [getattr(loop, what) / self.elements(loop) for loop in self.sweeps]
        return [getattr(self.path, what) / self.elements_per_thread]

    def once(self, what: str = "instructions") -> int:
        """What a thread runs at most besides the sweeps: outside loops, and a trip of each loop over masked blocks."""
        if not self.sweeps:
            return 0
        others = [loop for loop in self.loops if loop.loads and all(loop is not sweep for sweep in self.sweeps)]
        return getattr(self.path, what) + sum(getattr(loop, what) for loop in others)

    def all_per_logit(self, what: str = "instructions", vocabulary: int = 0) -> float:
        """Of everything that is run for a row of so many logits (0: of EXAMPLE_VOCABULARY where it is swept, else as
        many as are held), or for a tile. At most: the longest path is taken, and a block that is not whole pays for
        all of it, once."""
        if self.hidden:
            return sum(self.per_logit(what)) + self.once(what) / self.elements_per_thread
        block = self.elements_per_thread * self.threads
        vocabulary = vocabulary or (EXAMPLE_VOCABULARY if self.sweeps else round(block))
        if not self.sweeps:
            return getattr(self.path, what) * self.threads * -(-vocabulary // block) / vocabulary
        # The last block is either a trip of a masked loop, which is in `once`, or of the sweep itself.
        tail = any(loop.masked for loop in self.loops if loop.loads) and not self.sweeps[0].masked
        whole = vocabulary // block if tail else -(-vocabulary // block)
        return (sum(self.per_logit(what)) * whole * block + self.once(what) * self.threads) / vocabulary

    @property
    def narrow_accesses(self) -> list[int]:
        """Widths of accesses to global memory inside loops that are not of 16 bytes."""
        return sorted({w for loop in self.loops for w in (*loop.loads, *loop.stores) if w != LOGITS_WIDTH})

    @property
    def least_nve(self) -> int:
        """Passes that DRAM cannot be spared: logits and reference read once, the gradient written once."""
        if self.passes or self.kind == "scale":
            return self.passes or 2
        return 1 + self.full_kl + (self.kind != "statistics")

    def issue_bound(self, vocabulary: int = 0) -> float:
        """Modelled: seconds per logit to issue the instructions, those outside the sweeps included."""
        rate = self.machine.units * self.machine.issue * self.machine.clock * self.machine.warp_size
        return self.all_per_logit("instructions", vocabulary) / rate

    def mufu_bound(self, vocabulary: int = 0) -> float:
        """Modelled: seconds per logit in the special function units."""
        rate = self.machine.units * self.machine.mufu * self.machine.clock
        return self.all_per_logit("mufu", vocabulary) / rate

    def dram_bound(self) -> float:
        """Modelled: seconds per logit to move least_nve passes; none for a kernel that has its logits in registers."""
        return 0.0 if self.hidden else self.least_nve * ITEM_SIZE[self.dtype] / self.machine.dram

    def programs_per_sm(self) -> int:
        """Programs that one SM (or CU) holds at a time."""
        return self.machine.resident(self.num_warps, self.registers, self.shared_bytes, self.scalars)

    def occupancy(self) -> float:
        """Share of the threads an SM (or CU) can hold that these programs are."""
        return self.programs_per_sm() * self.num_warps / self.machine.warps

    def kilobytes_in_flight(self) -> float:
        """Wide loads of one trip of the first sweep (or of the row) by all threads of an SM. An H100 needs about 17 KB
        (DRAM rate x some 0.7 us of latency / 132) to keep its DRAM busy, if no load is issued ahead of its trip."""
        loads = (self.sweeps[0] if self.sweeps else self.outside).loads.get(LOGITS_WIDTH, 0)
        return loads * LOGITS_WIDTH * self.threads * self.programs_per_sm() / 1024


def report_from_dict(values: dict[str, Any]) -> StaticReport:
    """The inverse of dataclasses.asdict after a trip through JSON, which makes the widths strings."""

    def region(v: dict[str, Any]) -> Region:
        widths = {key: {int(w): n for w, n in v[key].items()} for key in ("loads", "stores")}
        return Region(**{**v, **widths})

    loops = [region(loop) for loop in values["loops"]]
    return StaticReport(**{**values, "loops": loops, **{key: region(values[key]) for key in ("outside", "path")}})
