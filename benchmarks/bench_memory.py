"""How much extra memory does a loss with its gradients take at its peak?

    pytest benchmarks/bench_memory.py               # table; --quick, --save, --compare OLD.json

It measures the peak memory of a process that makes one call (on CUDA the allocator's), gradients included. Predicted
from hidden states: 4 H (V + N) bytes for dweight and dhidden, which every way must return, and 64 MB for a chunk of
logits; a peer that holds all logits takes 3 to 4 times 4 N V bytes. Predicted from logits: 4 N V bytes for the gradient
and nothing else; in place nothing at all.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from benchmarks.bench_linear import HIDDEN, VOCABULARY
from benchmarks.harness import machine, memory
from benchmarks.harness.results import LIMIT, OURS, PEER, Case, Row

TOKENS = (1024, 4096, 16_384)
# Approximate bytes at the peak over those of all logits, measured at N = 4096: ways that would not fit are not tried.
FACTOR = {
    "TRL ChunkedLogProbFunction + PyTorch": 6.0,
    "F.linear_cross_entropy + PyTorch": 0.5,
    "Liger chunked GRPO": 0.5,
    "Liger chunked GRPO, compiled": 0.7,
    "cut-cross-entropy's torch_compile + PyTorch": 1.5,
    "PyTorch, all logits, compiled": 2.2,
}


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the suite whose ways are measured, and the sizes."""
    chosen: dict[str, dict[str, Any]] = {}
    for n in TOKENS[:1] if quick else TOKENS:
        of_head = {"tokens": n, "hidden": HIDDEN, "vocabulary": VOCABULARY}
        chosen[f"hidden states, N = {n}"] = {"suite": "linear", "arguments": of_head}
    for n in () if quick else TOKENS[:2]:
        chosen[f"fp32 logits, N = {n}"] = {
            "suite": "loss",
            "arguments": {"dtype": "fp32", "tokens": n, "vocabulary": 50_257},
        }
    return chosen


def test_memory(request, record, case) -> None:
    """Measure the peak of every way in a process of its own."""
    name, parameters = case
    suite, arguments = parameters["suite"], parameters["arguments"]
    module = importlib.import_module(f"benchmarks.bench_{suite}")
    setup = module.setup(**{**arguments, **module.SMALL})
    quick, rows = request.config.getoption("--quick"), []
    n, v = arguments["tokens"], arguments["vocabulary"]
    for name_of_way, way in setup.ways.items():
        if way.role == LIMIT or "masked" in name_of_way:
            continue
        expected = FACTOR.get(name_of_way, 3.0) * 4 * n * v if way.role == PEER else 0
        if quick and (way.compiled or way.slow or way.role == PEER):
            rows.append(Row(name_of_way, way.role, reason="left out by --quick"))
        elif expected > 0.6 * memory.room():
            rows.append(Row(name_of_way, way.role, reason=f"not tried: expected to take {expected / 1e9:.0f} GB"))
        else:
            peak = memory.in_process(module.__name__, arguments, name_of_way)
            rows.append(
                Row(name_of_way, way.role, **({"reason": peak} if isinstance(peak, str) else {"extra_peak": peak}))
            )
    each = 2 if suite == "linear" and torch.cuda.is_available() else 4  # bench_linear's type
    least = each * (HIDDEN * (v + n) if suite == "linear" else n * v)
    told = "dweight + dhidden, by arithmetic" if suite == "linear" else "the gradient, by arithmetic"
    rows.append(Row(told, LIMIT, extra_peak=least))
    formula = f"All logits are {each * n * v / 1e6:.0f} MB"
    record(Case("memory", name, parameters, "bytes", formula, setup.subject, rows, machine.provenance()))
    ours = [row for row in rows if row.role == OURS]
    assert all(row.extra_peak is not None for row in ours), ours
