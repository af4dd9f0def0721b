"""How many passes over the logits do the kernels make, and how many of them reach DRAM?

    python -m benchmarks.traffic [--vocabularies 32000,151936] [--resident 132,264] [--json FILE]

The kernels run in Triton's interpreter on a few rows; what they load and store is counted (recorder.py), masked lanes
excluded, in passes (NVe): bytes / (rows x vocabulary x element size). The accesses to one row, with their order, sizes
and eviction hints, are then replayed over many rows through a model of the L2 of an H100, and of an A100 and a B200
(l2_model.py). Issued passes and launches are counts; DRAM passes are *modelled*. `python -m benchmarks.gpu_static` runs
this too.
"""

from __future__ import annotations

import os

# Kernels must be defined under the interpreter; for this command there is no other way to run them.
os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repo_kernels.backends.interface import (
    COST_NONE,
    ENTROPY_GRADIENT,
    ENTROPY_NONE,
    ENTROPY_VALUE,
    KL_FULL,
    KL_K3,
    SCALARS,
    VALUES,
    Code,
    LossRows,
    gradient_buffer,
)

from .gpu_targets import TARGETS
from .l2_model import MEGABYTE, DramTraffic, replay
from .peers import CALLS, PACKAGES, absent, missing
from .recorder import Recorder

VOCABULARIES = (32000, 49152, 151936)
ROWS = 2  # recorded; all rows of a launch do the same
REPLAYED = 200 * MEGABYTE  # of logits, so that a launch finds nothing in the L2 of the launch before
L2_MODELS = ((50, True), (50, False), (25, True), (25, False))  # (MB, replacement by hints or strict LRU)
H100 = "sm_90"  # whose L2 the models above are
MACHINES = tuple(target for target, machine in TARGETS.items() if machine.l2)


@dataclass(frozen=True)
class Traffic:
    """What one computation moves. issued: passes between the kernels and the memory system. dram: by (MB, hints) with
    `resident` programs at a time. machines: by target, its L2 by hints, one program at a time on each of its units."""

    title: str
    vocabulary: int
    resident: int
    launches: int
    loaded: float
    stored: float
    dram: dict[tuple[int, bool], DramTraffic]
    machines: dict[str, DramTraffic] = field(default_factory=dict)

    @property
    def issued(self) -> float:
        """Passes loaded and stored."""
        return self.loaded + self.stored


def loss_rows(count: int, entropy: int, kl: int = KL_K3) -> LossRows:
    """Rows of a loss with a KL."""
    values = torch.zeros(len(VALUES), count)
    for name, value in (
        ("reward_advantages", 1.0),
        ("costs", -torch.inf),
        ("importance_weights", 1.0),
        ("weights", 1.0),
    ):
        values[VALUES.index(name)] = value
    scalars = dict.fromkeys(SCALARS, 1.0) | {"eps_low": 0.2, "eps_high": 0.2, "dual_clip": torch.inf}
    return LossRows(
        ids=torch.ones(count, dtype=torch.int64),
        values=values,
        scalars=torch.tensor(list(scalars.values())),
        code=Code(COST_NONE, kl, kl_importance_weighted=True, normalize=False, on_policy=False).pack(),
        softcap=0.0,
        entropy=entropy,
    )


def fused(logits: Tensor, entropy: int = ENTROPY_NONE) -> None:
    """Loss and gradient."""
    from repo_kernels.backends import triton as gpu

    gpu.fused(logits, None, loss_rows(logits.shape[0], entropy), gradient_buffer(logits))


def fused_full_kl(logits: Tensor) -> None:
    """Loss and gradient with the exact KL to reference logits."""
    from repo_kernels.backends import triton as gpu

    rows = loss_rows(logits.shape[0], ENTROPY_NONE, KL_FULL)
    gpu.fused(logits, logits.clone(), rows, gradient_buffer(logits))


def forward(logits: Tensor) -> None:
    """The loss alone."""
    from repo_kernels.backends import triton as gpu

    gpu.fused(logits, None, loss_rows(logits.shape[0], ENTROPY_NONE), None)


def statistics(logits: Tensor) -> None:
    """Log-probabilities alone."""
    from repo_kernels.backends import triton as gpu

    rows = loss_rows(logits.shape[0], ENTROPY_NONE)
    gpu.statistics(logits, None, rows.ids, rows.scalars, 0.0, ENTROPY_NONE)


def two_step(logits: Tensor) -> None:
    """Statistics, then the gradient from them."""
    from repo_kernels.backends import triton as gpu

    rows = loss_rows(logits.shape[0], ENTROPY_NONE)
    state = gpu.statistics(logits, None, rows.ids, rows.scalars, 0.0, ENTROPY_NONE)
    gpu.apply(logits, None, rows.ids, state, torch.ones(3, len(rows.ids)), rows.scalars, 0.0, gradient_buffer(logits))


OURS: tuple[tuple[str, Callable[[Tensor], None]], ...] = (
    ("fused", fused),
    ("fused, entropy value", lambda logits: fused(logits, ENTROPY_VALUE)),
    ("fused, entropy gradient", lambda logits: fused(logits, ENTROPY_GRADIENT)),
    ("fused, full KL", fused_full_kl),
    ("fused, forward only", forward),
    ("statistics", statistics),
    ("statistics + apply", two_step),
)


def record(call: Callable[[Tensor], None], vocabulary: int, dtype: torch.dtype = torch.bfloat16) -> Recorder:
    """Run a computation on (ROWS, vocabulary) logits and keep what it moved."""
    logits = torch.randn(ROWS, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    with Recorder(logits=logits) as recorder:
        call(logits)
    return recorder


def measure(
    title: str,
    call: Callable[[Tensor], None],
    vocabulary: int,
    dtype: torch.dtype = torch.bfloat16,
    models: Sequence[tuple[int, bool]] = L2_MODELS,
    resident: int = 132,
    machines: Sequence[str] = (),
) -> Traffic:
    """Count the passes of a computation, and model those that reach DRAM."""
    recorder = record(call, vocabulary, dtype)
    row_bytes = vocabulary * dtype.itemsize
    whole = ROWS * row_bytes
    loaded = sum(access.size for access in recorder.accesses() if not access.store)
    programs = recorder.row_programs(0, row_bytes)

    def dram(size: int, hints: bool, at_a_time: int) -> DramTraffic:
        least = max(REPLAYED, 2 * size * MEGABYTE)
        rows = -(-least // (row_bytes * at_a_time)) * at_a_time
        return replay(programs, row_bytes, rows, at_a_time, size * MEGABYTE, hints)

    return Traffic(
        title=title,
        vocabulary=vocabulary,
        resident=resident,
        launches=len(recorder.launches),
        loaded=loaded / whole,
        stored=(recorder.total_bytes() - loaded) / whole,
        dram={(size, hints): dram(size, hints, resident) for size, hints in models},
        machines={target: dram(TARGETS[target].l2 or 0, True, TARGETS[target].units) for target in machines},
    )


def as_json(found: Traffic) -> dict[str, Any]:
    """What gpu_static writes of it; its docstring has the schema."""
    models = [
        {"mb": size, "hints": hints, "read": round(dram.read, 4), "written": round(dram.written, 4)}
        for (size, hints), dram in found.dram.items()
    ]
    machines = {
        target: {"read": round(dram.read, 4), "written": round(dram.written, 4)}
        for target, dram in found.machines.items()
    }
    return {
        "title": found.title,
        "vocabulary": found.vocabulary,
        "launches": found.launches,
        "issued_loaded": round(found.loaded, 4),
        "issued_stored": round(found.stored, 4),
        "resident": found.resident,
        "dram": models,
        "machines": machines,
    }


def row(found: Traffic) -> str:
    """One line of the table."""
    cells = [f"{found.dram[model].total:.2f}" for model in L2_MODELS]
    cells += [
        f"{found.machines[name].total:.2f}" if name in found.machines else "" for name in MACHINES if name != H100
    ]
    split = f"{found.issued:.2f} ({found.loaded:.2f} + {found.stored:.2f})"
    return (
        f"| {found.title} | {found.vocabulary} | {found.launches} | {split} | {found.resident} | {' | '.join(cells)} |"
    )


def header() -> str:
    """Title, versions, date, columns."""
    from .static_tables import versions

    columns = ["computation", "V", "launches", "issued (load + store)", "programs"]
    columns += [f"DRAM, {size} MB, {'hints' if hints else 'LRU'} (modelled)" for size, hints in L2_MODELS]
    columns += [f"DRAM, {TARGETS[name].device} (modelled)" for name in MACHINES if name != H100]
    others = "; ".join(
        f"{TARGETS[name].device}: {TARGETS[name].units} programs, {TARGETS[name].l2} MB"
        for name in MACHINES
        if name != H100
    )
    return f"""# Passes over the logits

{versions("triton", "torch", *PACKAGES)}; {datetime.date.today().isoformat()}; bf16 logits.
Unit: one pass over the logits (NVe). Launches and issued passes are counted in Triton's interpreter. DRAM passes are
*modelled*: so many programs at a time in lockstep (132: one on each SM of an H100) through one fully associative L2 in
2 KB segments, replacement by the eviction hints or strictly least recently used; 25 MB is what an H100 has if its two
halves hold the same lines. By the hints also: {others}.
An MI300X has 4 MB of L2 for each eighth of its units, with a cache of 256 MB behind them that is part of the memory:
such a model would say nothing of it. TRL's chunked functions fold tiles that a matrix product has just
written, and cut-cross-entropy's logits never reach memory: neither is here.

| {" | ".join(columns)} |
|{"---|" * len(columns)}"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.split("\n")[0])
    default = ",".join(map(str, VOCABULARIES))
    parser.add_argument("--vocabularies", default=default, help="comma-separated; default: %(default)s")
    parser.add_argument(
        "--resident",
        default="132,264",
        help="programs running at a time; from the second on for the fused kernel only; default: %(default)s",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(header())
    vocabularies, resident = ([int(x) for x in text.split(",")] for text in (options.vocabularies, options.resident))
    calls = list(OURS)
    calls += [(title, call) for package, title, call in CALLS if not missing(package)]
    found = []
    for title, call in calls:
        for vocabulary in vocabularies:
            print(f"\r{title} {vocabulary}\033[K\r", end="", file=sys.stderr, flush=True)
            for programs in resident if call is fused else resident[:1]:
                machines = MACHINES if programs == resident[0] else ()
                found.append(measure(title, call, vocabulary, resident=programs, machines=machines))
                print(row(found[-1]), flush=True)
    for package, reason in absent().items():
        print(f"\n{package}: {reason}.")
    if options.json:
        with open(options.json, "w") as file:
            json.dump([as_json(traffic) for traffic in found], file)


if __name__ == "__main__":
    main()
