"""Test and measure the kernels on one GPU, beside their peers, within a few minutes.

    make gpu                                           # the same as python -m benchmarks.gpu --out gpu-results
    python -m benchmarks.gpu --out FOLDER --budget 350
    python -m benchmarks.gpu --out FOLDER --parts losses,forms
    python -m benchmarks.gpu --rehearse                # every line on a CPU with tiny sizes; numbers mean nothing

Runs from a plain copy of the tree, without installing it, with the packages it finds. Each part is a process with a
time limit and a file in FOLDER/parts; what it measured before a crash or its limit stays. Writes FOLDER/gpu.json, in
the form of benchmarks/results, and FOLDER/gpu.md, and prints that table. The exit status is 1 if a part or a test
failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.gpu import suite
from benchmarks.gpu.plan import PARTS, PLANS, Part
from benchmarks.harness import results
from benchmarks.harness.process import GRACE, Deadline, Process
from benchmarks.harness.results import OURS, Case

LEAST = 8.0  # seconds that are worth starting a part for
SLOWER = 4  # times longer limits in a rehearsal, beside other work on few cores


@dataclass
class Run:
    """The folder of a run, its parts and its deadline, and what failed so far."""

    out: Path
    deadline: Deadline
    rehearsal: bool
    failures: dict[str, str]

    @property
    def name(self) -> str:
        """Return the name of the merged files."""
        return "rehearsal" if self.rehearsal else "gpu"

    @property
    def plan(self) -> str:
        """Return the name of the plan."""
        return "rehearsal" if self.rehearsal else "real"

    @property
    def cache(self) -> Path:
        """Return the folder of compiled code and of what parts tell each other."""
        return self.out / "cache"

    def environment(self) -> dict[str, str]:
        """Return what is set for every process: empty caches, no network, the interpreter in a rehearsal."""
        common = {
            "TRITON_CACHE_DIR": str(self.cache / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.cache / "inductor"),
            "QUACK_CACHE_DIR": str(self.cache / "quack"),
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # looking for a device does not keep a process from forking
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TRITON_INTERPRET": "0",
            "HF_HUB_OFFLINE": "1",
        }
        if not self.rehearsal:
            return common
        return common | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def start(self, part: Part) -> Process | None:
        """Start a part, or say that there is no time."""
        limit = min(part.limit * (SLOWER if self.rehearsal else 1), self.deadline.left)
        if limit < LEAST:
            self.failures[part.name] = "no time left"
            print(f"{part.name}: not started, {limit:.0f} s left", flush=True)
            return None
        module, arguments = "benchmarks.gpu.part", [part.name, "--out", str(self.out / "parts")]
        until = str(Deadline.in_seconds(limit - GRACE).moment)
        arguments += ["--cache", str(self.cache), "--until", until, "--plan", self.plan]
        if part.name in suite.PARTS:
            module, arguments = "pytest", suite.arguments(part.name, PLANS[self.plan], self.outcomes(part))
        return Process(module, arguments, limit, self.cache / f"{part.name}.log", self.environment())

    def outcomes(self, part: Part) -> Path:
        """Return the file of the outcomes of a part's tests."""
        return self.cache / f"{part.name}.jsonl"

    def finish(self, part: Part, process: Process) -> None:
        """Wait for a part, keep the outcomes if it is one of tests, and print how it went."""
        reason = process.wait()
        if reason:
            self.failures[part.name] = reason
        if part.name in suite.PARTS:
            case = suite.case_of(part.name, PLANS[self.plan], self.outcomes(part), process.seconds, reason)
            results.save([case], self.out / "parts")
        self.save()
        left = f"{self.deadline.left:.0f} s left"
        print(f"{part.name}: {process.seconds:.0f} s, {reason or process.last_line()}; {left}", flush=True)

    def cases(self) -> list[Case]:
        """Return the cases of all parts, in the order of the parts."""
        files = sorted((self.out / "parts").glob("gpu_*.json"))
        found = [case for file in files for case in results.read(file)]
        order = [f"gpu_{part.name}" for part in PARTS]
        return sorted(found, key=lambda case: order.index(case.suite))

    def save(self) -> str:
        """Write the merged JSON, the tables and the log. Return the tables."""
        from benchmarks.reporting.gpu_tables import page

        cases = self.cases()
        if wrong := failed_rows(cases):
            self.failures["repo_kernels"] = "; ".join(wrong)
        document = {"suite": self.name, "failures": self.failures, "cases": [asdict(case) for case in cases]}
        (self.out / f"{self.name}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        text = page(cases, self.failures)
        (self.out / f"{self.name}.md").write_text(text, encoding="utf-8")
        logs = [f"== {log.stem}\n{log.read_text(errors='replace')}" for log in sorted(self.cache.glob("*.log"))]
        (self.out / f"{self.name}.log").write_text("\n".join(logs), encoding="utf-8")
        return text


def failed_rows(cases: Sequence[Case]) -> list[str]:
    """Return rows of ours that failed or differ from fp64, with the reason; a form that is only tried may."""
    rows = [(case, row) for case in cases if case.suite != "gpu_tests" for row in case.rows if row.role == OURS]
    kept = [(case, row) for case, row in rows if case.suite != "gpu_forms" or row.way == case.subject]
    return [f"{row.way} ({case.name}): {row.reason}" for case, row in kept if row.reason]


def run(parts: Sequence[Part], one: Run) -> None:
    """Run the parts in order, two at once where the plan says so."""
    running: list[tuple[Part, Process]] = []

    def finish_all() -> None:
        while running:
            one.finish(*running[0])
            running.pop(0)

    try:
        for part in parts:
            if not part.together:
                finish_all()
            process = one.start(part)
            running += [(part, process)] if process else []
        finish_all()
    finally:
        for _, process in running:
            process.stop()


def chosen_parts(names: str | None) -> list[Part]:
    """Return the parts of these names, separated by commas; all of them for None.

    Raises:
        ValueError: if there is no part of a name.
    """
    known = {part.name: part for part in PARTS}
    wanted = names.split(",") if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: there are {', '.join(known)}")
    return [part for part in PARTS if part.name in wanted]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results, which gets a gpu.json (default: gpu-results)")
    parser.add_argument("--budget", type=float, default=350, help="seconds for everything (default: 350)")
    parser.add_argument("--parts", help="names separated by commas (default: all): tests, agreement, losses, ...")
    parser.add_argument("--rehearse", action="store_true", help="run everything on a CPU; numbers mean nothing")
    options = parser.parse_args(arguments)
    try:
        parts = chosen_parts(options.parts)
    except ValueError as problem:
        parser.error(f"--parts {problem}")
    import torch

    if not (options.rehearse or torch.cuda.is_available()):
        parser.error("there is no GPU that torch can use; --rehearse runs everything on the CPU")
    out = options.out or (Path(tempfile.mkdtemp(prefix="gpu-rehearsal-")) if options.rehearse else Path("gpu-results"))
    one = Run(out.resolve(), Deadline.in_seconds(options.budget), options.rehearse, {})
    shutil.rmtree(one.cache, ignore_errors=True)
    shutil.rmtree(one.out / "parts", ignore_errors=True)
    one.cache.mkdir(parents=True)
    try:
        run(parts, one)
    except KeyboardInterrupt:
        one.failures["run"] = "interrupted"
    print(one.save())
    shutil.rmtree(one.cache, ignore_errors=True)
    print(f"written to {one.out}")
    return 1 if one.failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was measured is kept then, too
    sys.exit(main())
