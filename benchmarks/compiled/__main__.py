"""Print what the Triton kernels take and move, counted without a GPU, as Markdown tables.

    python -m benchmarks.compiled                                  # all types, four targets, and the passes: 3 minutes
    python -m benchmarks.compiled --targets sm_90 --dtypes bf16 --no-passes

First table: registers, spills, shared memory and widths of memory accesses of every compiled form, read from its
machine code. Second table: launches and passes over the logits of every computation, counted in Triton's interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.compiled.kernels import ITEM_SIZE, TARGETS, CompiledKernel, compile_all
from benchmarks.harness.machine import installed

COLUMNS = ("kernel", "warps", "registers", "spills / local bytes", "shared bytes", "loads", "stores")


def _widths(accesses: dict[int, int]) -> str:
    return " + ".join(f"{number} x {width} B" for width, number in sorted(accesses.items(), reverse=True)) or "none"


def row(kernel: CompiledKernel) -> str:
    """Return one line of the first table."""
    spills = f"{kernel.spills} / {kernel.local_bytes}"
    spills += f" ({kernel.lane_copies} scalar registers in lanes)" if kernel.lane_copies else ""
    cells = [kernel.name, kernel.num_warps, kernel.registers, spills, kernel.shared_bytes]
    for what in ("loads", "stores"):
        inside, outside = (_widths(getattr(part, what)) for part in (kernel.in_loops, kernel.outside))
        cells.append(f"{inside} \\| {outside}")
    return f"| {' | '.join(map(str, cells))} |"


def table(kernels: Sequence[CompiledKernel]) -> str:
    """Return the first table."""
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *map(row, kernels)])


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: {', '.join(unknown)} is not known; choose from {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(ITEM_SIZE), help="comma-separated; default: %(default)s")
    parser.add_argument("--no-passes", action="store_true", help="leave out the second table")
    options = parser.parse_args(arguments)
    targets = _chosen(parser, "--targets", options.targets, tuple(TARGETS))
    kernels = compile_all(targets, _chosen(parser, "--dtypes", options.dtypes, tuple(ITEM_SIZE)))
    versions = ", ".join(f"{package} {installed(package)}" for package in ("triton", "torch"))
    print(f"{versions}. Compiled without a GPU; nothing was run on one. Loads and stores of global memory: number of")
    print("instructions x bytes that a thread moves with each, inside loops | outside.")
    for target in targets:
        print(f"\n## {target}\n\n{table([kernel for kernel in kernels if kernel.target == target])}")
    if not options.no_passes:
        # Imported late: it defines the kernels under Triton's interpreter, which the compilations must not see.
        from benchmarks.compiled import traffic

        print(f"\n## Launches and passes over bf16 logits\n\n{traffic.table()}")


if __name__ == "__main__":
    main()
