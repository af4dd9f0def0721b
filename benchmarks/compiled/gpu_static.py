"""What the Triton kernels cost on GPUs that are not there: registers, spills, occupancy, instructions per logit.

    python -m benchmarks.compiled.gpu_static                                   # every variant, four targets, passes, rooflines
    python -m benchmarks.compiled.gpu_static --targets sm_90 --kind fused-swept --dtype bf16 --no-traffic
    python -m benchmarks.compiled.gpu_static --json reports.json

Every variant of ours and every kernel of the peers (peer_kernels.py) is compiled ahead of time and its machine code
read (machine_code.py). The passes over the logits come from a child process, `benchmarks.compiled.traffic`, because Triton's
interpreter must be switched on before kernels are defined. The times beside the counts are *modelled*: the least time
that a machine (gpu_targets.py) needs to issue the instructions, to compute the exponentials and to move the bytes.
Nothing here was run on a GPU.

--json writes one object:

    schema     1
    date       "2026-11-25"; commit: as machine.commit tells it
    versions   {package: version or null}
    absent     {peer's package: why it is not installed}
    targets    {target: {device, units, warp_size, issue, mufu, clock, dram, l2, ...}}: fields of gpu_targets.Machine
    reports    [fields of static_report.StaticReport]; report_from_dict makes one of it
    figures    [{name, target, programs, occupancy, instructions, mufu, issue_ps, mufu_ps, dram_ps}], one per report
               (only name and target if it has a reason): programs on a unit, share of its threads; instructions and
               MUFU per logit, all included, over a row of 151936 (or what is held of a row); modelled picoseconds per
               logit (dram_ps: of the least passes, null for matrix products)
    traffic    [{title, vocabulary, launches, issued_loaded, issued_stored, resident, dram, machines}] (null after
               --no-traffic): passes issued; dram: [{mb, hints, read, written}], modelled passes with `resident`
               programs; machines: {target: {read, written}}, the same by that target's L2, one program on each unit
    rooflines  [{title, target, vocabulary, kernels, programs, issue_ps, mufu_ps, dram_ps, dram_nve, modelled_ps, bound,
               tokens_per_second, against, ratio}]: modelled; bound: issue, mufu or dram; ratio: to `against`, ours
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.harness.machine import ROOT, commit, installed
from benchmarks.workloads import peers

from .gpu_targets import TARGETS
from .machine_code import amd_resources, disassemble_cubin, parse_amdgcn, regions
from .roofline import Roofline, rooflines
from .static_report import StaticReport
from .static_report import report_from_dict as report_from_dict


def inspect_variant(variant: Any, target: str) -> StaticReport:
    """Compile one variant for one target and read its machine code. The process must not have TRITON_INTERPRET set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    start, machine = time.perf_counter(), TARGETS[target]
    source = ASTSource(
        fn=variant.kernel,
        signature=dict(variant.signature),
        constexprs=dict(variant.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in variant.divisible},
    )
    gpu = GPUTarget(machine.backend, machine.architecture, machine.warp_size)
    compiled = triton.compile(source, target=gpu, options=variant.options)
    if machine.backend == "cuda":
        code, usage = disassemble_cubin(compiled.asm["cubin"])
        registers, spilled, local, lanes = usage["REG"], 0, usage["LOCAL"] + usage["STACK"], 0
    else:
        code, usage = parse_amdgcn(compiled.asm["amdgcn"]), amd_resources(compiled.asm["amdgcn"])
        registers = usage["vgpr_count"]  # includes the accumulation registers on this architecture
        spilled, lanes = usage["vgpr_spill_count"], usage["sgpr_spill_count"]
        local = usage["private_segment_fixed_size"]
    loops, outside, path = regions(code)
    return replace(
        _blank(variant, target),
        registers=registers,
        scalars=usage.get("sgpr_count", 0),
        spills=spilled + outside.spills + sum(loop.spills for loop in loops),
        lane_copies=lanes,
        local_bytes=local,
        shared_bytes=compiled.metadata.shared,
        seconds=round(time.perf_counter() - start, 2),
        # Loops without access to global memory are arithmetic of the row, not passes over it.
        loops=[loop for loop in loops if loop.loads or loop.stores],
        outside=outside,
        path=path,
    )


def _blank(variant: Any, target: str) -> StaticReport:
    """What is known before the kernel is compiled."""
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
        passes=getattr(variant, "passes", 0),
        hidden=getattr(variant, "hidden", 0),
        bytes_per_logit=getattr(variant, "bytes_per_logit", 0.0),
    )


def variants_of(target: str) -> list[Any]:
    """All variants of a target, and the kernels of the installed peers. They differ in `kind`."""
    from repo_kernels.backends.triton.variants import variants

    from .peer_kernels import static_variants

    return [*variants(TARGETS[target].warp_size), *static_variants(target)]


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    # The peers' kernels are compiled with Triton's default, as they are launched.
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


def _names(target: str) -> list[tuple[str, str, str]]:
    return [(v.name, v.kind, v.dtype) for v in variants_of(target)]


def _inspect_named(target: str, name: str) -> StaticReport:
    variant = next(v for v in variants_of(target) if v.name == name)
    try:
        return inspect_variant(variant, target)
    except Exception as error:  # of any compiler's kind; ours must compile everywhere, a peer's may not
        if not variant.kind.startswith("peer"):
            raise
        return replace(_blank(variant, target), reason=f"{type(error).__name__}: {error}".split("\n")[0][:200])


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


def traffic() -> tuple[str, list[dict[str, Any]]]:
    """(table, entries) of `python -m benchmarks.compiled.traffic`, run in a process of its own, in the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "traffic.json")
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "benchmarks.compiled.traffic", "--json", str(file)]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout, json.loads(file.read_text())


def document(
    reports: Sequence[StaticReport], passes: list[dict[str, Any]] | None, modelled: Sequence[Roofline]
) -> dict[str, Any]:
    """What --json writes."""
    return {
        "schema": 1,
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "versions": {package: installed(package) for package in ("triton", "torch", *peers.PACKAGES)},
        "absent": peers.absent(),
        "targets": {target: asdict(machine) for target, machine in TARGETS.items()},
        "reports": [asdict(report) for report in reports],
        "figures": [_figures(report) for report in reports],
        "traffic": passes,
        "rooflines": [row.as_json() for row in modelled],
    }


def _figures(report: StaticReport) -> dict[str, Any]:
    found: dict[str, Any] = {"name": report.name, "target": report.target}
    if report.reason:
        return found
    bounds = {"issue_ps": report.issue_bound(), "mufu_ps": report.mufu_bound(), "dram_ps": report.dram_bound()}
    found |= {"programs": report.programs_per_sm(), "occupancy": round(report.occupancy(), 4)}
    found |= {what: round(report.all_per_logit(what), 3) for what in ("instructions", "mufu")}
    return found | {name: round(1e12 * seconds, 4) if seconds else None for name, seconds in bounds.items()}


def write_json(contents: dict[str, Any], file: Path) -> None:
    """One line for each entry of a list, so that a committed file can be compared."""

    def lines(value: Any) -> str:
        if not isinstance(value, list):
            return json.dumps(value)
        return "[\n" + ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in value) + "\n]"

    file.write_text("{\n" + ",\n".join(f'"{key}": {lines(value)}' for key, value in contents.items()) + "\n}\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    from . import roofline, static_tables

    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled.gpu_static", description=__doc__.split("\n")[0])
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--kind", default="", help="only these kinds, comma-separated, e.g. fused-swept,peer,peer-gemm")
    parser.add_argument("--dtype", default="", help="only these dtypes, comma-separated: fp32, bf16, fp16")
    parser.add_argument("--no-traffic", action="store_true", help="neither passes nor rooflines")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write everything there")
    options = parser.parse_args(arguments)
    split = [[x for x in text.split(",") if x] for text in (options.targets, options.kind, options.dtype)]
    if unknown := set(split[0]) - set(TARGETS):
        parser.error(f"unknown targets {sorted(unknown)}; choose from {', '.join(TARGETS)}")
    reports = inspect_all(*split, progress=sys.stderr.isatty() or "CI" in os.environ)
    passes_table, passes = ("", None) if options.no_traffic else traffic()
    modelled = rooflines(reports, passes or [])
    if options.json:
        write_json(document(reports, passes, modelled), options.json)
    print(static_tables.header())
    print(static_tables.main_tables(reports, split[0]))
    if passes is not None:
        print("#" + passes_table)
        print(roofline.section(modelled))
    print(static_tables.other_types(reports, split[0]))


if __name__ == "__main__":
    main()
