"""How close to the machine's matrix products do the parts of a training step run, and what memory do they take?

    python -m benchmarks.bench_step

The default run's model and prompts, responses of exactly 40 tokens. Useful work is that of live rows: with P parameters
in the trunk's matrices, T tokens (a prompt once for its samples, the last token of a response never), N response
tokens, hidden size H, vocabulary V, L layers whose heads are W wide together and K pairs of a query and a key it sees,

    FLOPs = 2 (P T + H V N + 2 L W K) for a forward pass, three times that with its backward pass.

Predicted for 4 prompts of 155 tokens in all and 16 responses, at 196 GFLOP/s: T = 779, N = 640; forward 204 GFLOP,
1.04 s; update 613, of which the trunk is 496, the head 109 and attention 8, 3.13 s. AdamW and the clip move 40 bytes
per parameter, 5.4 GB, some 0.3 s. A rollout of 32 is 412 GFLOP, 2.1 s or 610 tokens/s, if its decode steps, 44 ms each,
are not bound by the 0.54 GB of weights that each of them reads. The peak is the best fp32 rate of torch.mm in the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Timing, interleaved, machine
from repo import assets
from repo.actor import Actor, read_reference
from repo.config import Config, ModelConfig
from repo.data import Prompt, batch_at, load_prompts, tokenize_prompts
from repo.memory import keep_freed_memory
from repo.objective import Batch, make_batch
from repo.policy import Policy, load_policy, load_reference
from repo.rollout import sample
from repo.sequences import Sequences, make_sequences
from repo.update import Updater
from repo_kernels import onednn_linear

ONEDNN = ", by oneDNN"
ROOT = Path(__file__).parents[1]
PROMPTS, SAMPLES, TOKENS, STEPS = 4, 4, 40, 18
BATCH = PROMPTS * SAMPLES
GIGA = 1e9


@dataclass(frozen=True)
class Step:
    """The parts of the default run's step. prompts: 8 of them; endless: the policy without stop tokens; layers: those
    that the embedded scorers read from the reference's forward pass."""

    config: Config
    prompts: list[Prompt]
    endless: Policy
    reference: Actor
    updater: Updater
    layers: list[int]

    def rollout(self, count: int) -> Sequences:
        """Sample from the first `count` prompts, never stopping early."""
        return sample(self.endless, self.prompts[:count], SAMPLES, self.config.rollout, 0, 0).sequences

    def read_reference(self, sequences: Sequences, layers: list[int]) -> Tensor:
        """Log-probabilities under the reference, (B, R)."""
        budget = self.config.optimizer.micro_batch_tokens
        return read_reference(self.reference, sequences, self.config.rollout.temperature, budget, layers)[0]

    def random_sequences(self, count: int) -> Sequences:
        """The first `count` prompts with responses of random tokens."""
        policy, group = self.endless, torch.arange(count).repeat_interleave(SAMPLES)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, policy.model.vocab_size, (len(group), TOKENS), generator=draw).tolist()
        return make_sequences([self.prompts[i].token_ids for i in group.tolist()], ids, policy.pad_id, group)

    def random_batch(self) -> Batch:
        """What an update reads, with random scores."""
        rewards, costs = torch.randn(2, BATCH, generator=torch.Generator().manual_seed(1))
        ref_logps = torch.full((BATCH, TOKENS), -11.0)
        sequences = self.random_sequences(PROMPTS)
        return make_batch(self.config, sequences, rewards, costs, ref_logps, 1.0, 0.02, None, {})

    def update(self, batch: Batch) -> None:
        """Forward, backward, clip and AdamW."""
        self.updater.update(batch, STEPS // 2, STEPS)


def load_step(model: str | None) -> Step:
    """With the embedded model, or that of a folder, of which the scorers would read the embedding."""
    folder, config = assets.ensure(), Config()
    path = model or str(folder / "policy")
    device, settings = torch.device("cpu"), ModelConfig(path=path)
    policy = load_policy(path, device, True, settings)
    reference = Actor(load_reference(policy, path, settings))
    room = policy.model.config.max_position_embeddings - TOKENS
    found = tokenize_prompts(load_prompts(folder / "prompts" / "train.jsonl"), policy.tokenizer, None, min(256, room))
    layer = 0 if model else json.loads((folder / "scorers" / "reward" / "scorer.json").read_text())["layer"]
    endless = dataclasses.replace(policy, eos_ids=(-1,))
    return Step(config, batch_at(found.kept, 0, 8, 0), endless, reference, Updater(Actor(policy), config), [layer])


@dataclass(frozen=True)
class Work:
    """tokens: T; flops: of a forward pass; both as the module says."""

    tokens: int
    flops: float


def useful_work(model: Any, sequences: Sequences) -> Work:
    """The work of live rows."""
    shape, prompts, own = model.config, sequences.prompt_lengths, sequences.response_lengths - 1
    first = torch.cat((torch.ones(1, dtype=torch.bool), sequences.group[1:] != sequences.group[:-1]))
    tokens = int(prompts[first].sum() + own.sum())
    pairs = int((prompts * (prompts + 1) // 2)[first].sum() + (own * prompts + own * (own + 1) // 2).sum())
    matrices = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
    head = shape.hidden_size * shape.vocab_size * int(sequences.response_lengths.sum())
    width = shape.num_attention_heads * (
        getattr(shape, "head_dim", 0) or shape.hidden_size // shape.num_attention_heads
    )
    return Work(tokens, 2.0 * (matrices * tokens + head + 2 * shape.num_hidden_layers * width * pairs))


def products(model: Any, tokens: int, largest: int) -> dict[str, tuple[Callable[[], object], float]]:
    """fp32 matrix products by name, with their FLOPs: squares, and those of trunk and head with a weight gradient."""
    h, i, v, n = model.config.hidden_size, model.config.intermediate_size, model.config.vocab_size, BATCH * TOKENS
    sizes = [(side,) * 3 for side in (2048, 4096) if side <= largest]
    sizes += [(tokens, h, i), (tokens, i, h), (i, tokens, h), (n, h, v), (n, v, h), (v, n, h)]
    found = {}
    for rows, inner, columns in sizes:
        a, b, out = torch.randn(rows, inner), torch.randn(columns, inner).T, torch.empty(rows, columns)
        call = functools.partial(torch.mm, a, b, out=out)
        found[f"{rows} x {inner} x {columns}"] = call, 2.0 * rows * inner * columns
        if onednn_linear.multiplies(a.device, a.dtype):
            onednn = functools.partial(onednn_linear.product, a, b.T.contiguous())
            found[f"{rows} x {inner} x {columns}{ONEDNN}"] = onednn, 2.0 * rows * inner * columns
    return found


def timed(call: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The same function, which notes how long it took."""

    def noting(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = call(*arguments)
        seconds.append(time.perf_counter() - start)
        return found

    return noting


def speed(step: Step, rounds: int, largest: int) -> str:
    """Markdown: time, work and share of the machine's peak of every part, all in turn in one process."""
    batch, model, passes = step.random_batch(), step.endless.model, list[float]()
    work = useful_work(model, batch.sequences)
    gemms = products(model, work.tokens, largest)
    objective = step.updater.objective
    objective.backward = timed(objective.backward, passes)  # type: ignore[method-assign]
    calls: dict[str, Callable[[], object]] = {name: call for name, (call, _) in gemms.items()}
    prompts = {f"rollout, batch {count * SAMPLES}": count for count in (PROMPTS, 2 * PROMPTS)}
    calls |= {name: functools.partial(step.rollout, count) for name, count in prompts.items()}
    calls["reference"] = lambda: step.read_reference(batch.sequences, [])
    calls["reference, with states for the scorers"] = lambda: step.read_reference(batch.sequences, step.layers)
    calls["update"] = lambda: step.update(batch)
    times = interleaved(calls, rounds)

    rates = {name: flops / times[name].median / GIGA for name, (_, flops) in gemms.items()}
    mm, peak = max(rate for name, rate in rates.items() if ONEDNN not in name), max(rates.values())
    lines = ["| rows x inner x columns | GFLOP/s |", "|---|---|"]
    lines += [f"| {name} | {rate:.0f} |" for name, rate in rates.items()]
    lines += ["", f"Peak: torch.mm {mm:.0f}, any {peak:.0f} GFLOP/s. T = {work.tokens}, N = {BATCH * TOKENS}.", ""]
    lines += ["| | median s [quartiles] | tokens/s | useful GFLOP | GFLOP/s | of torch.mm's peak, of any |"]
    lines += ["|---|---|---|---|---|---|"]

    def row(name: str, told: str, seconds: float, tokens: int, flops: float) -> None:
        rate = flops / GIGA / seconds
        share = f"{flops / GIGA:.0f} | {rate:.0f} | {rate / mm:.1%}, {rate / peak:.1%}"
        lines.append(f"| {name} | {told} | {tokens / seconds:.0f} | {share} |")

    for name, count in prompts.items():
        flops = useful_work(model, step.random_sequences(count)).flops
        row(name, spread(times[name]), times[name].median, count * SAMPLES * TOKENS, flops)
    for name in ("reference", "reference, with states for the scorers"):
        row(name, spread(times[name]), times[name].median, work.tokens, work.flops)
    backward, whole = statistics.median(passes[-rounds:]), times["update"]
    row("update", spread(whole), whole.median, work.tokens, 3 * work.flops)
    row("its forward and backward", f"{backward:.3f}", backward, work.tokens, 3 * work.flops)
    lines.append(f"| its clip and AdamW | {whole.median - backward:.3f} | | | | |")
    return "\n".join(lines)


def spread(time_: Timing) -> str:
    """Median and quartiles in seconds."""
    return f"{time_.median:.3f} [{time_.low:.3f}, {time_.high:.3f}]"


def resident(name: str) -> int:
    """Bytes of VmRSS or VmHWM of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def memory(model: str | None) -> str:
    """Markdown: this process's peak beyond what it must hold. To be called first of all in a process."""
    keep_freed_memory()
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the threads and the library's own buffers
    before = resident("VmRSS")
    step = load_step(model)
    weights, batch = 4 * sum(p.numel() for p in step.endless.model.parameters()), step.random_batch()
    held = 5 * weights  # policy, reference, gradients, two moments
    loaded = resident("VmRSS") - before
    rest = loaded - 2 * weights  # the tokenizer, the prompts, what loading left behind

    def peak(call: Callable[[], object]) -> str:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
        for _ in range(3):
            call()
        found = resident("VmHWM") - before
        return f"{found / GIGA:.2f} | {(found - held) / GIGA:.2f} | {(found - held - rest) / GIGA:.2f}"

    def whole() -> None:
        step.read_reference(step.rollout(PROMPTS), step.layers)
        step.update(batch)

    lines = [
        f"Weights, reference, gradients and AdamW states in fp32: {held / GIGA:.2f} GB; the process holds "
        f"{loaded / GIGA:.2f} GB after loading, of which policy and reference are {2 * weights / GIGA:.2f}.",
        "",
        "| peak of 3 in a row | GB beyond the imports | GB beyond those four too | and beyond the rest of loading |",
        "|---|---|---|---|",
        f"| update | {peak(lambda: step.update(batch))} |",
        f"| rollout, reference and update | {peak(whole)} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Print speed and memory, the latter of a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each part")
    parser.add_argument("--largest", type=int, default=4096, help="side of the largest square product")
    parser.add_argument("--model", help="folder of another model")
    parser.add_argument("--memory", action="store_true", help="measure the memory of this process alone")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    if options.memory:
        print(memory(options.model))
        return
    child = [sys.executable, "-m", "benchmarks.bench_step", "--memory"]
    child += ["--model", options.model] if options.model else []
    held = subprocess.run(child, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    keep_freed_memory()
    head = f"{machine()}, {options.rounds} rounds."
    text = f"{head}\n\n{speed(load_step(options.model), options.rounds, options.largest)}\n\n{held}"
    print(text)
    if options.out:
        command = " ".join(["python -m benchmarks.bench_step", *sys.argv[1:]])
        options.out.write_text(f"# The parts of a training step\n\n`{command}`\n\n{text}")


if __name__ == "__main__":
    main()
