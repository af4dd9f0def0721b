"""The tables of `python -m benchmarks.compiled.gpu_static`, as Markdown."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from benchmarks.harness.machine import installed
from benchmarks.workloads import peers

from .gpu_targets import TARGETS
from benchmarks.compiled.machine_code import Region
from .static_report import EXAMPLE_VOCABULARY, StaticReport


def versions(*packages: str) -> str:
    """Installed versions, for the head of a committed table."""
    return ", ".join(f"{package} {installed(package) or 'not installed'}" for package in packages)


def header() -> str:
    """Title, versions, date and what the columns mean."""
    rates = "\n".join(
        f"- {m.device}: {m.units} units, {m.issue} instructions and {m.mufu} MUFU results each per clock at "
        f"{m.clock / 1e9:.3f} GHz, {m.dram / 1e12:.2f} TB/s"
        for m in TARGETS.values()
    )
    absent = "".join(f"\n- Not here: {reason}." for reason in peers.absent().values())
    return f"""# Kernels, compiled ahead of time

{versions("triton", "torch", *peers.PACKAGES)}; {datetime.date.today().isoformat()}.
Compiled without a GPU; nothing was run on one. Counts are read from the machine code. The three times are *modelled*
for the machine in the heading: picoseconds per logit, instructions outside the loops spread over a row of
{EXAMPLE_VOCABULARY}. A kernel whose issue and MUFU times are below its DRAM time can be bound by memory. The DRAM time
is that of the least passes (fused: logits read once, gradient written once). Issue: of AMD's instructions the scalar
ones are counted too, which a compute unit issues beside the vector ones, so that its time is too long by their share.
Rates (sources in gpu_targets.py):

{rates}

Columns:

- loads, stores: width in bytes x instructions, of every loop in program order (m: masked) | outside loops.
- instr, MUFU: per logit, of every unmasked loop that reads logits in program order = their sum. A kernel without such
  a loop counts along its longest path, over the logits that a thread holds.
- once: at most so many instructions per thread besides these: the longest path outside loops, and one trip of each
  masked loop.
- spill: spill instructions and spilled registers / bytes of local memory, stack or scratch.
- programs: how many fit an SM or CU = their share of the threads it can hold. KB in flight: loaded by their threads in
  one trip (no load ahead of its trip); about 17 KB keep an H100's DRAM busy.
- Matrix products (cut-cross-entropy): a program computes a tile of logits from hidden states of H = 4096 and ends in
  the loss; instr is per logit of a tile: every loop over H (in the backward the logits again and both gradients), the
  rest in *all*. Tensor core instructions count as one, however long they take, and its locks as free, so that the
  issue time bounds it from below only; it has no passes over logits in memory. Blocks are those it takes without
  autotuning (forward 256 x 128 x 32, backward 128 x 128 x 32, indexed dot 128 x 256); the indexed dot computes only the
  logits of the targets.{absent}
"""


def _widths(accesses: dict[int, int]) -> str:
    return "+".join(f"{width}x{number}" for width, number in sorted(accesses.items(), reverse=True)) or "-"


def _places(report: StaticReport, what: str) -> str:
    def one(region: Region) -> str:
        return _widths(getattr(region, what)) + ("m" if region.masked else "")

    return f"{', '.join(one(loop) for loop in report.loops) or '-'} \\| {one(report.outside)}"


def _sum(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return " + ".join(f"{value:.1f}" for value in values) + f" = {sum(values):.1f}"


def _cells(report: StaticReport) -> list[str]:
    """Columns that the tables share, after the kernel's name."""
    return [
        str(report.num_warps),
        str(report.registers),
        f"{report.spills} / {report.local_bytes}" + f" ({report.lane_copies} lanes)" * bool(report.lane_copies),
        str(report.shared_bytes),
        f"{report.programs_per_sm()} = {report.occupancy():.0%}",
        _places(report, "loads"),
        _places(report, "stores"),
    ]


def row(report: StaticReport) -> str:
    """One line of the table."""
    if report.reason:
        return f"| {report.name} | {report.dtype} | cannot be compiled: {report.reason} |"
    cells = [report.name, report.dtype, *_cells(report), _sum(report.per_logit()), _sum(report.per_logit("mufu"))]
    bounds = (report.issue_bound(), report.mufu_bound(), report.dram_bound())
    cells += [str(report.once()), *(f"{1e12 * bound:.2f}" for bound in bounds)]
    if report.target == "sm_90":
        cells.append(f"{report.kilobytes_in_flight():.0f}")
    return "| " + " | ".join(cells) + " |"


def table(reports: Sequence[StaticReport], target: str) -> str:
    """Kernels over rows of logits, of one target."""
    columns = "kernel,dtype,warps,registers,spill,shared,programs,loads,stores,instr,MUFU,once".split(",")
    columns += ["issue ps (modelled)", "MUFU ps (modelled)", "DRAM ps (modelled)"]
    columns += ["KB in flight"] * (target == "sm_90")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *map(row, reports)]
    return "\n".join(lines) + "\n"


def matrix_row(report: StaticReport) -> str:
    """One line of the table of matrix products."""
    if report.reason:
        return f"| {report.name} | cannot be compiled: {report.reason} |"
    cells = [report.name, *_cells(report), _sum(report.per_logit())]
    cells += [f"{report.all_per_logit(what):.1f}" for what in ("instructions", "mufu")]
    cells += [f"{1e12 * bound:.2f}" for bound in (report.issue_bound(), report.mufu_bound())]
    return "| " + " | ".join(cells) + " |"


def matrix_table(reports: Sequence[StaticReport]) -> str:
    """Kernels that multiply matrices and end in the loss, of one target."""
    columns = "kernel,warps,registers,spill,shared,programs,loads,stores,instr,all,MUFU".split(",")
    columns += ["issue ps (modelled)", "MUFU ps (modelled)"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *map(matrix_row, reports)]
    return "\n".join(lines) + "\n"


def main_tables(reports: Sequence[StaticReport], targets: Sequence[str]) -> str:
    """Of each target, the kernels for bf16 logits, ours and the peers'."""
    parts = []
    for target in targets:
        own = [report for report in reports if report.target == target and not _is_other(report)]
        rows = [report for report in own if not report.hidden]
        products = [report for report in own if report.hidden]
        parts.append(f"## {target}, {TARGETS[target].device}\n\n" + (table(rows, target) if rows else ""))
        if products:
            parts.append(f"Matrix products, H = {products[0].hidden}:\n\n" + matrix_table(products))
    return "\n".join(parts)


def other_types(reports: Sequence[StaticReport], targets: Sequence[str]) -> str:
    """Of each target, our kernels for fp32 and fp16 logits."""
    parts = []
    for target in targets:
        if rows := [report for report in reports if report.target == target and _is_other(report)]:
            parts.append(f"### {target}, {TARGETS[target].device}\n\n" + table(rows, target))
    return "## fp32 and fp16\n\n" + "\n".join(parts) if parts else ""


def _is_other(report: StaticReport) -> bool:
    return report.dtype != "bf16" and not report.kind.startswith("peer")
