"""Print what the Triton kernels take and move, counted without a GPU, as Markdown tables.

    python -m benchmarks.compiled                                  # all types, four targets, and the passes: 3 minutes
    python -m benchmarks.compiled --targets sm_90 --dtypes bf16 --no-passes
    python -m benchmarks.compiled --part decode --no-passes        # the kernels of a decode step: 5 minutes
    python -m benchmarks.compiled --triton 3.4.0,3.7.1             # with these versions of Triton, side by side
    python -m benchmarks.compiled --triton all                     # with every supported one: 15 minutes

Compiled forms: registers, programs that a multiprocessor holds at once (by warps, registers and shared memory), spills,
shared memory and widths of memory accesses, read from the machine code. Passes: launches and passes over the logits of
every computation, counted in Triton's interpreter. A version of Triton that is not the environment's is installed in a
folder of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.compiled import tables, versions
from benchmarks.compiled.kernels import ITEM_SIZE, PARTS, TARGETS, CompiledKernel, compile_all
from benchmarks.harness.machine import installed


def _chosen(parser: argparse.ArgumentParser, option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option}: {', '.join(unknown)} is not known; choose from {', '.join(known)}")
    return names


def _print_one_version(kernels: Sequence[CompiledKernel], targets: Sequence[str]) -> None:
    print(f"Triton {kernels[0].triton}. Compiled without a GPU; nothing was run on one. Loads and stores of global")
    print("memory: number of instructions x bytes that a thread moves with each, inside loops | outside.")
    for target in targets:
        print(f"\n## {target}\n\n{tables.details([kernel for kernel in kernels if kernel.target == target])}")


def _print_versions(kernels: Sequence[CompiledKernel], targets: Sequence[str]) -> None:
    print("Compiled without a GPU; nothing was run on one. Over the compiled forms: registers of a thread, programs")
    print(f"that a multiprocessor holds.\n\n{tables.summary(kernels)}")
    for target in targets:
        print(f"\n## {target}: registers (programs), and spills / local bytes where there are any\n")
        print(tables.side_by_side([kernel for kernel in kernels if kernel.target == target]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated; default: %(default)s")
    parser.add_argument("--dtypes", default=",".join(ITEM_SIZE), help="comma-separated; default: %(default)s")
    parser.add_argument("--triton", help="versions, comma-separated, or all; default: the environment's")
    parser.add_argument("--part", choices=PARTS, default="losses", help="default: %(default)s")
    parser.add_argument("--no-passes", action="store_true", help="leave out launches and passes")
    options = parser.parse_args(arguments)
    targets = _chosen(parser, "--targets", options.targets, tuple(TARGETS))
    dtypes = _chosen(parser, "--dtypes", options.dtypes, tuple(ITEM_SIZE))
    chosen = versions.VERSIONS if options.triton == "all" else (options.triton or "").split(",")
    kernels = [
        kernel for version in chosen for kernel in compile_all(targets, dtypes, version or None, part=options.part)
    ]
    print(f"torch {installed('torch')}. ", end="")
    (_print_versions if len(chosen) > 1 else _print_one_version)(kernels, targets)
    if not options.no_passes:
        # Imported late: it defines the kernels under Triton's interpreter, which the compilations must not see.
        from benchmarks.compiled import traffic

        print(f"\n## Launches and passes over bf16 logits\n\n{traffic.table()}")


if __name__ == "__main__":
    main()
