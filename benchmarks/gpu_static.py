"""What the Triton kernels cost on GPUs that are not there: registers, spills, access widths, instructions per logit.

    python -m benchmarks.gpu_static                                   # every variant, four targets
    python -m benchmarks.gpu_static --targets sm_90 --kind fused-swept --dtype bf16
    python -m benchmarks.gpu_static --json reports.json

Every variant is compiled ahead of time and its machine code read (machine_code.py). The times beside the counts are
*modelled*: the least time per logit that an H100 needs to issue the instructions, to compute the exponentials and to
move the bytes. Nothing here was run on a GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from typing import Any

from .machine_code import Region, amd_resources, disassemble_cubin, parse_amdgcn, regions

# name: (backend, architecture, threads in a warp)
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
ITEM_SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
LOGITS_WIDTH = 16

# H100 SXM: streaming multiprocessors, issue slots and MUFU results per clock of each, boost clock, DRAM bytes/s.
SMS, ISSUE_SLOTS, MUFU_RATE, CLOCK, DRAM = 132, 4, 16, 1.755e9, 3.35e12
# What a streaming multiprocessor of an H100 holds.
SM_THREADS, SM_REGISTERS, SM_SHARED, SM_PROGRAMS = 2048, 65536, 227 * 1024, 32
EXAMPLE_VOCABULARY = 151936  # spreads the instructions outside the loops over a row


@dataclass
class StaticReport:
    """One kernel on one target.

    loops: innermost loops in program order. outside: the rest of the kernel. path: the longest path through that rest.
    """

    name: str
    kind: str
    dtype: str
    target: str
    num_warps: int
    elements_per_thread: int
    entropy: int = 0
    softcap: bool = False
    full_kl: bool = False
    registers: int = 0
    spills: int = 0  # spill instructions, and on AMD the spilled vector registers
    lane_copies: int = 0  # AMD: scalar registers that are kept in lanes of a vector register, not in memory
    local_bytes: int = 0  # local memory, stack or scratch
    shared_bytes: int = 0
    seconds: float = 0.0  # to compile and to read
    loops: list[Region] = field(default_factory=list)
    outside: Region = field(default_factory=Region)
    path: Region = field(default_factory=Region)

    @property
    def threads(self) -> int:
        """In a program."""
        return self.num_warps * TARGETS[self.target][2]

    @property
    def plain(self) -> bool:
        """Neither softcap nor full KL."""
        return not (self.softcap or self.full_kl)

    @property
    def sweeps(self) -> list[Region]:
        """Loops over the bulk of a row. Where there are others, masked ones take the few blocks that are not whole;
        those that only write fill dead rows with zeros; one after its unrolled form takes the last trips."""
        reading = [loop for loop in self.loops if loop.loads]
        bulk = [loop for loop in reading if not loop.masked] or reading
        return [loop for i, loop in enumerate(bulk) if i == 0 or not self._is_remainder(loop, bulk[i - 1])]

    def _is_remainder(self, loop: Region, before: Region) -> bool:
        times, rest = divmod(before.bytes_loaded(), loop.bytes_loaded())
        return times > 1 and rest == 0 and before.bytes_stored() == times * loop.bytes_stored()

    def elements(self, loop: Region) -> float:
        """Logits that a thread takes in one trip, from the bytes it loads (compilers may unroll)."""
        return loop.bytes_loaded() / (ITEM_SIZE[self.dtype] * (2 if self.full_kl else 1))

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

    def once_per_logit(self, what: str = "instructions") -> float:
        """`once` spread over a row of EXAMPLE_VOCABULARY logits."""
        return self.once(what) * self.threads / EXAMPLE_VOCABULARY

    @property
    def narrow_accesses(self) -> list[int]:
        """Widths of accesses to global memory inside loops that are not of 16 bytes."""
        return sorted({w for loop in self.loops for w in (*loop.loads, *loop.stores) if w != LOGITS_WIDTH})

    @property
    def least_nve(self) -> int:
        """Passes that DRAM cannot be spared: logits and reference read once, the gradient written once."""
        if self.kind == "scale":
            return 2
        return 1 + self.full_kl + (self.kind != "statistics")

    def issue_bound(self) -> float:
        """Modelled: seconds per logit to issue the instructions on an H100, those outside the sweeps included."""
        instructions = sum(self.per_logit()) + self.once_per_logit()
        return instructions / 32 / (SMS * ISSUE_SLOTS * CLOCK)

    def mufu_bound(self) -> float:
        """Modelled: seconds per logit in the special function units of an H100."""
        return (sum(self.per_logit("mufu")) + self.once_per_logit("mufu")) / (SMS * MUFU_RATE * CLOCK)

    def dram_bound(self) -> float:
        """Modelled: seconds per logit to move least_nve passes."""
        return self.least_nve * ITEM_SIZE[self.dtype] / DRAM

    def programs_per_sm(self) -> int:
        """Programs that one SM of an H100 holds at a time; registers are granted to a warp by the 256."""
        registers = -(-self.registers * 32 // 256) * 256 * self.num_warps
        shared = SM_SHARED // (self.shared_bytes + 1024)
        return min(SM_THREADS // self.threads, SM_REGISTERS // max(registers, 1), shared, SM_PROGRAMS)

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


def inspect_variant(variant: Any, target: str) -> StaticReport:
    """Compile one variant for one target and read its machine code. The process must not have TRITON_INTERPRET set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start = time.perf_counter()
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in variant.divisible},
    )
    options = getattr(variant, "options", {"num_warps": variant.num_warps, "num_stages": variant.num_stages})
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    if TARGETS[target][0] == "cuda":
        code, usage = disassemble_cubin(compiled.asm["cubin"])
        registers, spilled, local, lanes = usage["REG"], 0, usage["LOCAL"] + usage["STACK"], 0
    else:
        code, usage = parse_amdgcn(compiled.asm["amdgcn"]), amd_resources(compiled.asm["amdgcn"])
        registers = usage["vgpr_count"]  # includes the accumulation registers on this architecture
        spilled, lanes = usage["vgpr_spill_count"], usage["sgpr_spill_count"]
        local = usage["private_segment_fixed_size"]
    loops, outside, path = regions(code)
    return StaticReport(
        name=variant.name,
        kind=variant.kind,
        dtype=variant.dtype,
        target=target,
        num_warps=variant.num_warps,
        elements_per_thread=variant.elements_per_thread,
        entropy=variant.entropy,
        softcap=bool(variant.softcap),
        full_kl=bool(variant.full_kl),
        registers=registers,
        spills=spilled + outside.spills + sum(loop.spills for loop in loops),
        lane_copies=lanes,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        seconds=time.perf_counter() - start,
        # Loops without access to global memory are arithmetic of the row, not passes over it.
        loops=[loop for loop in loops if loop.loads or loop.stores],
        outside=outside,
        path=path,
    )


def variants_of(target: str) -> list[Any]:
    """All variants of a target, and the peers' kernels that can be imported. They differ in `kind`."""
    from repo_kernels.gpu.variants import variants

    from . import peers

    return [*variants(TARGETS[target][2]), *peers.static_variants(target)]


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # The peers' kernels are compiled with Triton's default, as they are launched.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def _names(target: str) -> list[tuple[str, str, str]]:
    return [(v.name, v.kind, v.dtype) for v in variants_of(target)]


def _inspect_named(target: str, name: str) -> StaticReport:
    return inspect_variant(next(v for v in variants_of(target) if v.name == name), target)


def names(targets: Iterable[str]) -> dict[str, list[tuple[str, str, str]]]:
    """(name, kind, dtype) of every variant of each target, asked of a process without the interpreter."""
    with _pool(1) as pool:
        return {target: pool.submit(_names, target).result() for target in targets}


def _pool(workers: int) -> ProcessPoolExecutor:
    # Spawned, because the parent may have imported Triton with TRITON_INTERPRET set; this module imports it late.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_without_interpreter)


def inspect_all(
    targets: Sequence[str] = tuple(TARGETS),
    kinds: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = False,
) -> list[StaticReport]:
    """Reports of all variants of the targets, restricted to some kinds and dtypes, compiled on all cores."""
    with _pool(workers or len(os.sched_getaffinity(0))) as pool:
        listed = {target: pool.submit(_names, target) for target in targets}
        chosen = [
            (target, name)
            for target, future in listed.items()
            for name, kind, dtype in future.result()
            if (not kinds or kind in kinds) and (not dtypes or dtype in dtypes)
        ]
        futures = [pool.submit(_inspect_named, *work) for work in chosen]
        for done, future in enumerate(as_completed(futures), 1):
            if progress:
                report = future.result()
                print(f"\r{done}/{len(futures)} {report.target} {report.name:<40}", end="", file=sys.stderr, flush=True)
        if progress:
            print("\r" + " " * 70 + "\r", end="", file=sys.stderr)
        return [future.result() for future in futures]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    from .static_tables import header, table

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_static", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--kind", default="", help="only these kinds, comma-separated, e.g. fused-swept,peer")
    parser.add_argument("--dtype", default="", help="only these dtypes, comma-separated: fp32, bf16, fp16")
    parser.add_argument("--json", metavar="FILE", help="also write the reports there")
    options = parser.parse_args(arguments)
    split = [[x for x in text.split(",") if x] for text in (options.targets, options.kind, options.dtype)]
    if unknown := set(split[0]) - set(TARGETS):
        parser.error(f"unknown targets {sorted(unknown)}; choose from {', '.join(TARGETS)}")
    reports = inspect_all(*split, progress=sys.stderr.isatty() or "CI" in os.environ)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(report) for report in reports], file, indent=1)
    print(header())
    for target in split[0]:
        print(table([report for report in reports if report.target == target], target))


if __name__ == "__main__":
    main()
