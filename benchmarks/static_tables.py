"""The tables of `python -m benchmarks.gpu_static`, as Markdown."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from .gpu_static import CLOCK, DRAM, EXAMPLE_VOCABULARY, ISSUE_SLOTS, MUFU_RATE, SMS, StaticReport
from .machine_code import Region


def versions(*packages: str) -> str:
    """Installed versions, for the head of a committed table."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def header() -> str:
    """Title, versions, date and what the columns mean."""
    rates = f"{ISSUE_SLOTS} issue slots and {MUFU_RATE} MUFU results per SM and clock at {CLOCK / 1e9:.3f} GHz"
    return f"""# Kernels, compiled ahead of time

{versions("triton", "torch", "liger-kernel", "trl")}; {datetime.date.today().isoformat()}.
Compiled without a GPU; nothing was run on one. Counts are read from the machine code. The three times are *modelled*
for an H100 ({SMS} SMs, {rates}, {DRAM / 1e12:.2f} TB/s):
picoseconds per logit, instructions outside the loops spread over a row of {EXAMPLE_VOCABULARY}. A kernel whose issue
and MUFU times are below its DRAM time can be bound by memory. The DRAM time is that of the least passes (fused: logits
read once, gradient written once).

- loads, stores: width in bytes x instructions, of every loop in program order (m: masked) | outside loops.
- instr, MUFU: per logit, of every unmasked loop that reads logits in program order = their sum. A kernel without such
  a loop counts along its longest path, over the logits that a thread holds.
- once: at most so many instructions per thread besides these: the longest path outside loops, and one trip of each
  masked loop.
- spill: spill instructions and spilled registers / bytes of local memory, stack or scratch.
- programs: how many fit an SM of an H100. KB in flight: loaded by their threads in one trip (no load ahead of its
  trip); about 17 KB keep an H100's DRAM busy.
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


def row(report: StaticReport) -> str:
    """One line of the table; modelled columns only where the code is for the modelled machine."""
    cells = [
        report.name,
        report.dtype,
        str(report.num_warps),
        str(report.registers),
        f"{report.spills} / {report.local_bytes}" + f" ({report.lane_copies} lanes)" * bool(report.lane_copies),
        str(report.shared_bytes),
        _places(report, "loads"),
        _places(report, "stores"),
        _sum(report.per_logit()),
        _sum(report.per_logit("mufu")),
        str(report.once()),
    ]
    if report.target == "sm_90":
        bounds = (report.issue_bound(), report.mufu_bound(), report.dram_bound())
        cells += [f"{1e12 * bound:.2f}" for bound in bounds]
        cells += [str(report.programs_per_sm()), f"{report.kilobytes_in_flight():.0f}"]
    return "| " + " | ".join(cells) + " |"


def table(reports: Sequence[StaticReport], target: str) -> str:
    """All variants of one target."""
    columns = "kernel,dtype,warps,registers,spill,shared,loads,stores,instr,MUFU,once".split(",")
    if target == "sm_90":
        columns += ["issue ps (modelled)", "MUFU ps (modelled)", "DRAM ps (modelled)", "programs", "KB in flight"]
    lines = [
        f"## {target}\n",
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *map(row, reports),
    ]
    return "\n".join(lines) + "\n"
