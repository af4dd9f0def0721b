"""How do time and memory grow with vocabulary, tokens, batch and context?

    pytest benchmarks/bench_scaling.py              # table; --quick, --save, --compare OLD.json

The loss from logits over V and N beside PyTorch and a copy; the loss from hidden states over N beside its three GEMMs;
the update over the batch and over the length of the prompts beside a large GEMM. Predicted: flat rates everywhere,
except for small N, where a call's fixed cost (0.1 ms) and cold threads show, and for long prompts, whose attention
grows with the square of the length (a tenth of the FLOPs at 256 tokens, half at 2000).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from benchmarks import bench_linear, bench_loss, bench_step
from benchmarks.bench_step import LARGEST
from benchmarks.harness import memory
from benchmarks.harness.cases import Setup, Way
from benchmarks.harness.results import LIMIT, OURS
from benchmarks.workloads.models import EMBEDDED
from benchmarks.workloads.training_step import SAMPLES, load_step, passes, useful_work

SMALL = {"tokens": 64}
VOCABULARIES = tuple(2**n for n in range(13, 19))
TOKENS = (256, 1024, 4096, 16_384, 65_536)
NARROW = 8192  # vocabulary of the sweep over tokens, so that the logits of the last one fit
PROMPTS = (1, 2, 4, 8, 16)  # of SAMPLES responses each
CONTEXT = (32, 128, 512, 1024, 1800)  # tokens of a prompt; with its responses it fits a micro-batch and is read once
YARDSTICK = 4096  # rows of the GEMMs that all sizes are compared with


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return every point of every curve; with --quick two points of the losses and one from hidden states."""
    scale = 16 if torch.cuda.is_available() else 1

    def some(values: tuple[int, ...]) -> tuple[int, ...]:
        return values[:2] if quick else values

    points = {f"loss, V = {v}": {"kind": "loss", "tokens": 256 * scale, "size": v} for v in some(VOCABULARIES)}
    points |= {f"loss, N = {n}": {"kind": "loss", "tokens": n, "size": NARROW} for n in some(TOKENS)}
    points |= {
        f"linear, N = {n}": {"kind": "linear", "tokens": n, "size": 49_152} for n in (TOKENS[:1] if quick else TOKENS)
    }
    if not quick:
        points |= {f"update, batch {SAMPLES * b}": {"kind": "update", "tokens": 40, "size": b} for b in PROMPTS}
        points |= {f"update, prompts of {c} tokens": {"kind": "context", "tokens": c, "size": 2} for c in CONTEXT}
    return points


def setup(kind: str, tokens: int, size: int) -> Setup:
    """Set up one point of a curve. size: the vocabulary, or the number of prompts."""
    if kind == "loss":
        return _of_loss(tokens, size)
    return _of_linear(tokens, size) if kind == "linear" else _of_update(kind, tokens, size)


def _of_loss(tokens: int, vocabulary: int) -> Setup:
    whole = bench_loss.setup("fp32", tokens, vocabulary)
    copies = [name for name, way in whole.ways.items() if way.role == LIMIT]
    names = ["repo_loss", *copies]
    fits = 6 * 4 * tokens * vocabulary < 0.4 * memory.room()
    names += ["torch eager"] if fits else []
    absent = {} if fits else {"torch eager": f"takes 6 times the logits of {4e-9 * tokens * vocabulary:.1f} GB"}
    return dataclasses.replace(whole, ways={name: whole.ways[name] for name in names}, absent=absent)


def _of_linear(tokens: int, vocabulary: int) -> Setup:
    problem = bench_linear.make_problem(tokens, bench_linear.HIDDEN, vocabulary)
    work = 6.0 * tokens * bench_linear.HIDDEN * vocabulary
    tolerance = bench_linear.TOLERANCE[problem.hidden.dtype]
    ours = functools.partial(bench_linear.gradients, bench_linear.ours, problem)
    ways = {"linear_repo_loss": Way(ours, OURS, work, tolerance)}
    absent = {}
    if tokens <= YARDSTICK:
        eager = functools.partial(bench_linear.gradients, bench_linear.materialised, problem)
        ways["PyTorch, all logits"] = Way(eager, work=work, tolerance=tolerance)
    else:
        absent["PyTorch, all logits"] = f"takes 3 times the logits of {4e-9 * tokens * vocabulary:.1f} GB"
    rows = min(tokens, YARDSTICK)
    alone = bench_linear.products(bench_linear.make_problem(rows, bench_linear.HIDDEN, vocabulary))
    told = "" if rows == tokens else f" of {rows} rows"
    ways |= {f"{name}{told}": Way(call, LIMIT, work * rows / tokens) for name, call in alone.items()}
    formula = f"6 N H V = {work / 1e9:.0f} GFLOP, H = {bench_linear.HIDDEN}, V = {vocabulary}"
    exact = functools.partial(bench_linear.gradients, bench_linear.materialised)
    return Setup(ways, "linear_repo_loss", "operations", formula, absent, lambda: exact(problem.in_fp64()))


def _of_update(kind: str, tokens: int, prompts: int) -> Setup:
    step = load_step(EMBEDDED)
    draw = torch.Generator().manual_seed(0)
    if kind == "context":
        ids = torch.randint(0, step.endless.model.vocab_size, (prompts, tokens), generator=draw).tolist()
    else:
        ids = [step.prompts[i % len(step.prompts)].token_ids for i in range(prompts)]
    batch = step.random_batch(step.random_sequences(ids))
    work = useful_work(step.endless.model, batch.sequences)
    flops = passes(step) * work.flops
    ways = {"update": Way(lambda: step.update(batch), OURS, flops, tokens=work.tokens)}
    ways |= {name: Way(call, LIMIT, of) for name, (call, of) in bench_step.products([(LARGEST // 2,) * 3]).items()}
    formula = f"T = {work.tokens} tokens, useful {flops / 1e9:.0f} GFLOP"
    return Setup(ways, "update", "operations", formula)


def peak(parameters: dict[str, Any], way: str) -> str:
    """Measure no peaks: bench_memory does."""
    return ""


def test_scaling(measure, case) -> None:
    """Measure one point; the largest take minutes and are timed once."""
    large = case[1]["kind"] == "linear" and case[1]["tokens"] > 4 * YARDSTICK
    measure(case, rounds=1 if large else 3, warmups=0 if large else 1)
