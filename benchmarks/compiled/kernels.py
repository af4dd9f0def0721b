"""Compile every form of the Triton kernels, without a GPU, and read registers, spills and accesses from its code."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

from benchmarks.compiled import versions
from benchmarks.compiled.machine_code import Accesses, accesses, amd_resources, disassemble_cubin, parse_amdgcn
from benchmarks.compiled.occupancy import programs

WIDTH = 16  # bytes: the widest access of one thread
ITEM_SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
# Triton's name of a target -> (backend, architecture, threads of a warp).
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
PARTS = {"losses": "variants", "decode": "decode.variants"}  # part -> module that lists its variants


@dataclass(frozen=True)
class CompiledKernel:
    """One form of a kernel on one target.

    registers: of a thread. spills: spill instructions, and on AMD spilled vector registers. lane_copies: scalar
    registers that AMD's compiler keeps in lanes of a vector register, not in memory. local_bytes: local memory, stack
    or scratch of a thread. shared_bytes: of a program. in_loops, outside: accesses to global memory.
    """

    name: str
    kind: str
    dtype: str
    target: str
    num_warps: int
    elements_per_thread: int
    registers: int
    spills: int
    lane_copies: int
    local_bytes: int
    shared_bytes: int
    in_loops: Accesses
    outside: Accesses
    triton: str

    @property
    def programs(self) -> int:
        """Programs that a multiprocessor holds at once."""
        return programs(self.target, self.num_warps, self.registers, self.shared_bytes)

    @property
    def narrow(self) -> list[int]:
        """Widths of accesses inside loops that are not WIDTH bytes."""
        return sorted({width for width in (*self.in_loops.loads, *self.in_loops.stores) if width != WIDTH})

    @property
    def wide_elements(self) -> int:
        """Logits that a thread loads with the full-width accesses of the code, each counted once."""
        loads = sum(part.loads.get(WIDTH, 0) for part in (self.in_loops, self.outside))
        return loads * WIDTH // ITEM_SIZE[self.dtype]


def compile_variant(variant: Any, target: str) -> CompiledKernel:
    """Compile one variant (of variants.variants) for one target. TRITON_INTERPRET must not be set in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
    )
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=variant.options)
    if "cubin" in compiled.asm:
        code, usage = disassemble_cubin(compiled.asm["cubin"])
        registers, local = usage["REG"], usage["LOCAL"] + usage["STACK"]
    else:
        code, usage = parse_amdgcn(compiled.asm["amdgcn"]), amd_resources(compiled.asm["amdgcn"])
        # The count includes the accumulation registers on this architecture.
        registers, local = usage["vgpr_count"], usage["private_segment_fixed_size"]
    in_loops, outside = accesses(code)
    return CompiledKernel(
        name=variant.name,
        kind=variant.kind,
        dtype=variant.dtype,
        target=target,
        num_warps=variant.num_warps,
        elements_per_thread=variant.elements_per_thread,
        registers=registers,
        spills=usage.get("vgpr_spill_count", 0) + in_loops.spills + outside.spills,
        lane_copies=usage.get("sgpr_spill_count", 0),
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        in_loops=in_loops,
        outside=outside,
        triton=triton.__version__,
    )


def _variants(target: str, part: str) -> list[Any]:
    from repo_kernels.backends.triton.forms import Target

    backend, architecture, warp_size = TARGETS[target]
    shape = Target(warp_size, backend == "cuda" and int(architecture) >= 100)
    listed: list[Any] = importlib.import_module(f"repo_kernels.backends.triton.{PARTS[part]}").variants(shape)
    return listed


@dataclass(frozen=True)
class Form:
    """A variant that can be compiled.

    dtype: of the logits, "" for a kernel that reads none. specialised: run-time arguments whose value or alignment is
    compiled in.
    """

    name: str
    kind: str
    dtype: str
    specialised: tuple[str, ...]


def _forms(target: str, part: str) -> list[Form]:
    kernels = _variants(target, part)
    return [
        Form(v.name, v.kind, v.dtype if v.elements_per_thread or part == "decode" else "", tuple(_specialised(v)))
        for v in kernels
    ]


def _specialised(variant: Any) -> Iterator[str]:
    for parameter in variant.kernel.params:
        left_alone = parameter.do_not_specialize and parameter.do_not_specialize_on_alignment
        if not parameter.is_constexpr and not left_alone:
            yield parameter.name


def _compile_named(target: str, part: str, name: str) -> CompiledKernel:
    return compile_variant(next(variant for variant in _variants(target, part) if variant.name == name), target)


def _prepare(version: str | None) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    if version:
        versions.use(version)


def _pool(workers: int, version: str | None = None) -> ProcessPoolExecutor:
    # Spawned, because the parent may have imported another Triton, or defined the kernels with TRITON_INTERPRET set.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare, initargs=(version,))


def forms(targets: Iterable[str], part: str = "losses") -> dict[str, list[Form]]:
    """Return every variant of a part of PARTS, by target."""
    with _pool(1) as pool:
        return {target: pool.submit(_forms, target, part).result() for target in targets}


def compile_all(
    targets: Sequence[str] = tuple(TARGETS),
    dtypes: Sequence[str] = (),
    triton: str | None = None,
    workers: int | None = None,
    part: str = "losses",
    only: Sequence[str] = (),
) -> list[CompiledKernel]:
    """Compile variants on all cores.

    Args:
        part: of PARTS.
        only: names of variants; all where empty.
        targets: keys of TARGETS.
        dtypes: fp32, bf16, fp16, of the logits; all where empty. Kernels that read no logits are always compiled.
        triton: version of Triton, installed if it was not; None for the environment's.
        workers: processes; None for one per core.
    """
    if triton:
        versions.folder_of(triton)  # before the workers look for it at the same time
    with _pool(workers or len(os.sched_getaffinity(0)), triton) as pool:
        listed = {target: pool.submit(_forms, target, part) for target in targets}
        futures = [
            pool.submit(_compile_named, target, part, form.name)
            for target, future in listed.items()
            for form in future.result()
            if (not dtypes or form.dtype in ("", *dtypes)) and (not only or form.name in only)
        ]
        for done, _ in enumerate(as_completed(futures), 1):
            if sys.stderr.isatty():
                print(f"\rcompiled {done} of {len(futures)} \r", end="", file=sys.stderr, flush=True)
        return [future.result() for future in futures]
