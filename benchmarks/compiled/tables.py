"""Compiled kernels as Markdown tables: one version of Triton in detail, or several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.compiled.kernels import CompiledKernel

DETAILS = ("kernel", "warps", "registers", "programs", "spills / local bytes", "shared bytes", "loads", "stores")
SUMMARY = (
    "triton", "target", "forms", "registers", "programs", "spills", "local bytes", "narrow in loops", "shared bytes",
)  # fmt: skip


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(header), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _widths(accesses: dict[int, int]) -> str:
    return " + ".join(f"{number} x {width} B" for width, number in sorted(accesses.items(), reverse=True)) or "none"


def _details(kernel: CompiledKernel) -> list[object]:
    spills = f"{kernel.spills} / {kernel.local_bytes}"
    spills += f" ({kernel.lane_copies} scalar registers in lanes)" if kernel.lane_copies else ""
    cells = [kernel.name, kernel.num_warps, kernel.registers, kernel.programs, spills, kernel.shared_bytes]
    for what in ("loads", "stores"):
        inside, outside = (_widths(getattr(part, what)) for part in (kernel.in_loops, kernel.outside))
        cells.append(f"{inside} \\| {outside}")
    return cells


def details(kernels: Sequence[CompiledKernel]) -> str:
    """Return a table with a line for each kernel."""
    return _table(DETAILS, map(_details, kernels))


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]} to {ordered[-1]}" if ordered[0] != ordered[-1] else str(ordered[0])


def summary(kernels: Sequence[CompiledKernel]) -> str:
    """Return a table with a line for each version of Triton and target: ranges and totals over the kernels."""
    rows = []
    for triton, target in dict.fromkeys((kernel.triton, kernel.target) for kernel in kernels):
        group = [kernel for kernel in kernels if (kernel.triton, kernel.target) == (triton, target)]
        rows.append(
            [
                triton, target, len(group), _range(k.registers for k in group), _range(k.programs for k in group),
                sum(k.spills for k in group), sum(k.local_bytes for k in group), sum(len(k.narrow) for k in group),
                _range(k.shared_bytes for k in group),
            ]
        )  # fmt: skip
    return _table(SUMMARY, rows)


def side_by_side(kernels: Sequence[CompiledKernel]) -> str:
    """Return a table with a line for each kernel of one target, and for each version of Triton its registers.

    In brackets the programs that a multiprocessor holds; spills and local bytes follow where there are any.
    """
    versions = tuple(dict.fromkeys(kernel.triton for kernel in kernels))
    by_name: dict[str, dict[str, CompiledKernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.triton] = kernel

    def cell(kernel: CompiledKernel | None) -> str:
        if kernel is None:
            return ""
        spilled = f", {kernel.spills} / {kernel.local_bytes}" if kernel.spills or kernel.local_bytes else ""
        return f"{kernel.registers} ({kernel.programs}){spilled}"

    rows = ([name, *(cell(group.get(version)) for version in versions)] for name, group in by_name.items())
    return _table(("kernel", *versions), rows)
