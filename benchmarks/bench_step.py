"""How close to the machine's matrix products do the parts of a training step run, and how much memory do they take?

    pytest benchmarks/bench_step.py                 # table; --quick, --save, --compare OLD.json

The default run's model and prompts, responses of exactly 40 tokens; on a GPU also shapes of 0.5 to 8 B with random
weights, in bf16 with FlashAttention. The work is that of live rows (workloads/training_step.py); its share of the best
matrix product in the same run is the MFU. Decoding is bound by reading the weights, so its case counts their bytes.

Predicted in fp32 for 4 prompts of 155 tokens in all and 16 responses, at 196 GFLOP/s: T = 779, N = 640; forward 204
GFLOP, 1.04 s; update 613, of which the trunk is 496, the head 109 and attention 8, 3.13 s. AdamW and the clip move 40
bytes per parameter, 5.4 GB, some 0.3 s. A rollout of 32 is 412 GFLOP, 2.1 s or 610 tokens/s, if its decode steps, 44 ms
each, are not bound by the 0.54 GB of weights that each of them reads. Peaks do not include weights, reference,
gradients and optimiser states.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness.cases import Setup, Way
from benchmarks.harness.limits import copy
from benchmarks.harness.machine import ROOT, device
from benchmarks.harness.memory import reset_peak, resident
from benchmarks.harness.results import LIMIT, OURS
from benchmarks.workloads.models import EMBEDDED, GPU_MODELS
from benchmarks.workloads.training_step import PROMPTS, SAMPLES, TOKENS, Step, load_step, passes, useful_work
from repo_kernels.layers import onednn_linear

SMALL: dict[str, Any] = {}
LARGEST = 8192 if torch.cuda.is_available() else 4096  # side of the largest square product


def cases(quick: bool) -> dict[str, dict[str, Any]]:
    """Return the parts of a step, and decoding, for each model that fits the machine."""
    models = [EMBEDDED]
    if torch.cuda.is_available() and not quick:
        models += GPU_MODELS
    chosen: dict[str, dict[str, Any]] = {
        f"{model}": {"model": model, "decode": False, "quick": quick} for model in models
    }
    if not quick:
        chosen |= {f"{model}, decode": {"model": model, "decode": True} for model in models}
    return chosen


def products(sizes: list[tuple[int, int, int]], rounds: bool) -> dict[str, tuple[Callable[[], object], float]]:
    """Return matrix products by name, with their FLOPs: by torch.mm, and by oneDNN where the loop uses it.

    rounds: fp32 layers multiply in bfloat16 on the CPU, so do the same too.
    """
    on, calls = device(), dict[str, tuple[Callable[[], object], float]]()
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    for rows, inner, columns in sizes:
        a = torch.randn(rows, inner, device=on, dtype=dtype)
        b = torch.randn(columns, inner, device=on, dtype=dtype).T
        out, name = torch.empty(rows, columns, device=on, dtype=dtype), f"{rows} x {inner} x {columns}"
        calls[f"torch.mm {name}"] = functools.partial(torch.mm, a, b, out=out), 2.0 * rows * inner * columns
        if onednn_linear.multiplies(a.device, a.dtype):
            call = functools.partial(onednn_linear.product, a, b.T.contiguous())
            calls[f"oneDNN {name}"] = call, 2.0 * rows * inner * columns
        if rounds:
            call = functools.partial(torch.mm, a.bfloat16(), b.bfloat16())
            calls[f"torch.mm {name} bfloat16"] = call, 2.0 * rows * inner * columns
    return calls


def setup(model: str, decode: bool, quick: bool = False) -> Setup:
    """Set up the parts of a step beside matrix products of their sizes, or decoding beside a copy."""
    return _decoding(model) if decode else _parts(model, quick)


def _parts(model: str, quick: bool) -> Setup:
    step = load_step(model)
    batch = step.random_batch(step.random_sequences(step.first(PROMPTS)))
    work, net = useful_work(step.endless.model, batch.sequences), step.endless.model
    of_update, shape = passes(step) * work.flops, net.config
    h, i, v, n = shape.hidden_size, shape.intermediate_size, shape.vocab_size, PROMPTS * SAMPLES * TOKENS
    t = work.tokens
    sizes = [(LARGEST,) * 3]
    if not quick:
        sizes += [(t, h, i), (t, i, h), (i, t, h), (n, h, v), (n, v, h), (v, n, h)]
    ways, inside = {}, list[float]()
    for count in (PROMPTS,) if quick else (PROMPTS, 2 * PROMPTS):
        rows = count * SAMPLES
        flops = useful_work(net, step.random_sequences(step.first(count))).flops
        told = {"work": flops, "tokens": rows * TOKENS}
        ways[f"rollout, batch {rows}"] = Way(functools.partial(step.rollout, count), OURS, **told)
        if not quick:
            ways[f"transformers generate, batch {rows}"] = Way(functools.partial(step.generate, count), **told)
    for name, layers in (("reference", []), ("reference, with states for the scorers", step.layers)):
        call = functools.partial(step.read_reference, batch.sequences, layers)
        ways[name] = Way(call, OURS, work.flops, tokens=t)

    objective = step.updater.accumulator
    objective.backward = timed(type(objective).backward.__get__(objective), inside)  # type: ignore[method-assign]
    ways["update"] = Way(lambda: step.update(batch), OURS, of_update, tokens=t)
    of_rollout = ways[f"rollout, batch {PROMPTS * SAMPLES}"].work or 0.0
    ways["rollout, reference and update"] = Way(
        lambda: step.whole(batch), OURS, of_rollout + work.flops + of_update, tokens=n
    )
    limits = products(sizes, rounds=_rounds(step))
    ways |= {name: Way(call, LIMIT, flops) for name, (call, flops) in limits.items()}

    def notes(rounds: int) -> dict[str, str]:
        backward = statistics.median(inside[-2 * rounds :])  # the update alone and in the whole step
        return {
            "Forward and backward of an update, median": f"{backward:.3f} s on the host",
            "Attention": step.endless.attention.describe().removeprefix("attention: "),
            "Products": step.endless.matmul.describe().removeprefix("matrix products: ")
            if step.endless.matmul
            else "in the model's type",
        }

    formula = (
        f"Useful FLOPs of live rows: T = {t}, N = {n}; forward {work.flops / 1e9:.0f} GFLOP, "
        f"update {of_update / 1e9:.0f}; tokens of the whole step are response tokens"
    )
    return Setup(ways, "update", "operations", formula, notes=notes)


def _rounds(step: Step) -> bool:
    """Return whether the layers of an fp32 model multiply in bfloat16."""
    return step.endless.matmul is not None and step.endless.matmul.half


def _decoding(model: str) -> Setup:
    step = load_step(model)
    # Bytes of the matrices in the type that decoding computes in; the embedding is only looked up.
    each = 2 if step.config.model.dtype == "bfloat16" or _rounds(step) else 4
    size = each * sum(m.weight.numel() for m in step.endless.model.modules() if isinstance(m, nn.Linear))
    ways = {}
    for count in (PROMPTS, 2 * PROMPTS):
        rows = count * SAMPLES
        told = {"work": float(TOKENS * size), "tokens": rows * TOKENS}
        ways[f"rollout, batch {rows}"] = Way(functools.partial(step.rollout, count), OURS, **told)
        ways[f"transformers generate, batch {rows}"] = Way(functools.partial(step.generate, count), **told)
    ways |= copy()
    formula = f"Weights read once a token of each row: {TOKENS} x {size / 1e6:.0f} MB; the prompts' prefill included"
    return Setup(ways, f"rollout, batch {PROMPTS * SAMPLES}", "bytes", formula)


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """Wrap a function so that it appends the host seconds of each call to `seconds`."""

    def noting(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    return noting


def peak(parameters: dict[str, Any], way: str) -> int | str:
    """Return the peak bytes of 3 calls in a process of its own, beyond weights, reference, gradients and moments."""
    if parameters["decode"] or way not in ("update", "rollout, reference and update"):
        return ""
    if torch.cuda.is_available():
        return _beyond_states(parameters["model"], way)
    command = [sys.executable, "-m", "benchmarks.bench_step", json.dumps(parameters), way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else f"peak: exit status {done.returncode}"


def _beyond_states(model: str, way: str) -> int:
    """Measure the peak of 3 calls. On a CPU this must be the first call in its process."""
    cuda = torch.cuda.is_available()
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # starts the threads and allocates the library's own buffers
    before = 0 if cuda else resident("VmRSS")
    step = load_step(model)
    trained = sum(p.numel() for p in step.endless.model.parameters() if p.requires_grad)
    models = {id(m): m for m in (step.endless.model, step.reference.lm.model)}.values()
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    held = weights + 12 * trained  # gradients and two moments
    batch = step.random_batch(step.random_sequences(step.first(PROMPTS)))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    for _ in range(3):
        step.update(batch) if way == "update" else step.whole(batch)
    return (torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")) - before - held


def test_step(measure, case) -> None:
    """Measure every part in turn."""
    quick = case[1].get("quick", False)
    measure(case, rounds=1 if quick else 5, warmups=1)


if __name__ == "__main__":
    print(_beyond_states(json.loads(sys.argv[1])["model"], sys.argv[2]))
