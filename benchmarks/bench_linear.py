"""How much beyond its three matrix products does the loss from hidden states cost, in time and in memory?

    python -m benchmarks.bench_linear             # time: all candidates in turn in one run
    python -m benchmarks.bench_linear --memory    # extra peak memory at 1k, 4k and 16k tokens, a process each

The yardstick is three GEMMs (logits, dhidden, dweight: 3 x 2 N H V operations) that allocate what they return, as a
caller without these kernels would; that they could write over old memory is the second line. Peers that are not
installed are left out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.bench_loss import plain
from benchmarks.peers import missing
from benchmarks.timing import interleaved, machine
from repo_kernels import linear_repo_loss, onednn_linear

SEQUENCES, HIDDEN, VOCABULARY = 4, 576, 49_152
BETA = 0.02
TOKENS = (1024, 4096, 16_384)
YARDSTICK, OURS, FROZEN = "three GEMMs, fresh outputs", "linear_repo_loss", "linear_repo_loss, frozen head"


@dataclass(frozen=True)
class Problem:
    """hidden (N, H) and weight (V, H) that require grad; ids, old log-probs, advantages (N,), of 4 equal sequences."""

    hidden: Tensor
    weight: Tensor
    ids: Tensor
    old: Tensor
    advantages: Tensor


def make_problem(tokens: int) -> Problem:
    """Random hidden states and head; an advantage per sequence, and log-probs near those of the head."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator) * HIDDEN**-0.5
    ids = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    target = (hidden * weight[ids]).sum(-1)
    # the other logits are N(0, 1), so that their log-sum is about log V + 1/2
    old = target - torch.log(torch.tensor(float(VOCABULARY))) - 0.5 + 0.1 * torch.randn(tokens, generator=generator)
    advantages = torch.randn(SEQUENCES, generator=generator).repeat_interleave(tokens // SEQUENCES)
    return Problem(hidden.requires_grad_(), weight.requires_grad_(), ids, old, advantages)


def materialised(p: Problem, weight: Tensor) -> Tensor:
    """PyTorch: all logits, log_softmax, autograd."""
    return plain(p.hidden @ weight.t(), p.ids, p.old, p.advantages)


def ours(p: Problem, weight: Tensor) -> Tensor:
    """Chunks of logits, on the backend of the device."""
    return linear_repo_loss(p.hidden, weight, p.ids, p.old, p.advantages, ref_logps=p.old, beta=BETA).loss


def liger(p: Problem, weight: Tensor, compiled: bool = False) -> Tensor:
    """Liger's chunked GRPO loss, a sequence per chunk as by default; its bias-corrected KL is k3 times rho."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled, use_bias_correction_kl=True)
    by_sequence = (SEQUENCES, -1)
    old = p.old.view(by_sequence)
    return module(
        p.hidden.view(SEQUENCES, -1, HIDDEN),
        weight,
        p.ids.view(by_sequence),
        torch.ones_like(old),
        p.advantages.view(by_sequence)[:, 0],
        ref_per_token_logps=old,
        old_per_token_logps=old,
    )[0]


def trl(p: Problem, weight: Tensor) -> Tensor:
    """TRL's chunked log-probabilities at the chunk size of its trainers, then the loss in PyTorch."""
    from trl.kernels import ChunkedLogProbFunction

    logps, *_ = ChunkedLogProbFunction.apply(p.hidden, weight, None, p.ids, 1.0, 32_768, None, 1.0, ())
    delta = logps - p.old
    ratio = delta.exp()
    surrogate = -torch.minimum(ratio * p.advantages, ratio.clamp(0.8, 1.2) * p.advantages)
    return (surrogate + BETA * ratio * ((-delta).exp() + delta - 1)).mean()


def losses() -> dict[str, Callable[[Problem, Tensor], Tensor]]:
    """Every way to the same loss that is installed."""
    ways: dict[str, Callable[[Problem, Tensor], Tensor]] = {"PyTorch, all logits": materialised, OURS: ours}
    if not missing("liger-kernel"):
        ways["Liger chunked GRPO"] = liger
        ways["Liger chunked GRPO, compiled"] = lambda p, weight: liger(p, weight, compiled=True)
    if not missing("trl"):
        ways["TRL chunked log-probs + PyTorch"] = trl
    return ways


def gradients(way: Callable[[Problem, Tensor], Tensor], p: Problem, frozen: bool = False) -> tuple[Tensor, ...]:
    """(loss, dhidden, dweight): forward and backward of one call; without dweight where the head is frozen."""
    weight = p.weight.detach() if frozen else p.weight
    loss = way(p, weight)
    return loss.detach(), *torch.autograd.grad(loss, (p.hidden,) if frozen else (p.hidden, weight))


def check(name: str, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """Largest error of the loss, whose terms are of size 1 and cancel, and relative error of the gradients."""
    errors = [
        (got[0] - expected[0]).abs(),
        *((a - b).norm() / b.norm() for a, b in zip(got[1:], expected[1:], strict=False)),
    ]
    error = max(x.item() for x in errors)
    assert error < 1e-5, f"{name} differs by {error:.1e}"
    return f"{name}: {error:.1e}"


def products(p: Problem) -> dict[str, Callable[[], object]]:
    """The three GEMMs alone."""
    x, w = p.hidden.detach(), p.weight.detach()
    grad = torch.randn(x.shape[0], VOCABULARY)
    out = torch.empty_like(grad), torch.empty_like(x), torch.empty_like(w)

    def fresh() -> object:
        return torch.mm(x, w.t()), torch.mm(grad, w), torch.mm(grad.t(), x)

    def given() -> None:
        torch.mm(x, w.t(), out=out[0])
        torch.mm(grad, w, out=out[1])
        torch.mm(grad.t(), x, out=out[2])

    def mixed() -> object:
        return onednn_linear.product(x, w), onednn_linear.product(grad, w.t()), torch.mm(grad.t(), x)

    alone: dict[str, Callable[[], object]] = {YARDSTICK: fresh, "three GEMMs, outputs given": given}
    if onednn_linear.multiplies(x.device, x.dtype):
        alone["three GEMMs, the first two by oneDNN"] = mixed
    return alone


def time_table(tokens: int, rounds: int) -> str:
    """Markdown: median, spread, rate of the useful operations, ratios."""
    problem, ways = make_problem(tokens), losses()
    expected = gradients(materialised, problem)
    agreement = [check(name, gradients(way, problem), expected) for name, way in ways.items()]
    agreement.append(check(FROZEN, gradients(ours, problem, frozen=True), expected))
    candidates = products(problem) | {
        name: (lambda way=way: gradients(way, problem))  # type: ignore[misc]
        for name, way in ways.items()
    }
    candidates[FROZEN] = lambda: gradients(ours, problem, frozen=True)
    times = interleaved(candidates, rounds)
    yardstick, mine = times[YARDSTICK].median, times[OURS].median
    operations = 2 * tokens * HIDDEN * VOCABULARY
    peak = max(3 * operations / times[name].median for name in products(problem))
    lines = [
        f"N = {tokens}, H = {HIDDEN}, V = {VOCABULARY}, float32; three GEMMs are {3 * operations / 1e9:.0f} GFLOP",
        f"Difference from PyTorch's loss and, relative, its gradients: {'; '.join(agreement)}",
        "",
        "| | median ms [quartiles] | useful GFLOP/s | of the GEMM peak | / three GEMMs | this / linear_repo_loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, time in times.items():
        rate = (2 if name == FROZEN else 3) * operations / time.median
        lines.append(
            f"| {name} | {1e3 * time.median:.0f} [{1e3 * time.low:.0f}, {1e3 * time.high:.0f}] | {rate / 1e9:.0f} "
            f"| {rate / peak:.0%} | {time.median / yardstick:.3f} | {time.median / mine:.3f} |"
        )
    return "\n".join(lines)


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    with open("/proc/self/status") as status:
        found = re.search(field + r":\s+(\d+) kB", status.read())
    assert found is not None
    return int(found[1]) * 1024


def extra_peak(name: str, tokens: int) -> int:
    """Bytes that one forward and backward adds at its peak to what was there; gradients included."""
    way = ours if name == FROZEN else losses()[name]
    # imports, threads and the compiler's caches are not the loss's
    gradients(way, make_problem(16 if name != "Liger chunked GRPO, compiled" else tokens), frozen=name == FROZEN)
    problem = make_problem(tokens)
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")  # the peak is the present from here on
    before = resident("VmRSS")
    kept = gradients(way, problem, frozen=name == FROZEN)
    peak = resident("VmHWM") - before
    del kept
    return peak


def memory_table() -> str:
    """Markdown: extra peak of each candidate in a process of its own."""
    lines = ["| extra peak, MB | " + " | ".join(f"N = {n}" for n in TOKENS) + " |", "|---" * (1 + len(TOKENS)) + "|"]
    lines.append(
        "| dweight + dhidden | " + " | ".join(f"{4e-6 * HIDDEN * (VOCABULARY + n):.0f}" for n in TOKENS) + " |"
    )
    for name in (*losses(), FROZEN):
        cells = []
        for tokens in TOKENS:
            command = [sys.executable, "-m", "benchmarks.bench_linear", "--peak-of", name, "--tokens", str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True)
            cells.append(f"{int(done.stdout) / 1e6:.0f}" if done.returncode == 0 else "failed")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of times, or of peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each candidate")
    parser.add_argument("--tokens", type=int, default=TOKENS[0], help="rows, in 4 sequences")
    parser.add_argument("--memory", action="store_true", help="peaks instead of times")
    parser.add_argument("--peak-of", help="print the extra peak of one candidate in bytes")
    options = parser.parse_args()
    if options.peak_of:
        print(extra_peak(options.peak_of, options.tokens))
    elif options.memory:
        print(f"{machine()}\n\n{memory_table()}")
    else:
        print(f"{machine()}, {options.rounds} rounds\n\n{time_table(options.tokens, options.rounds)}")


if __name__ == "__main__":
    main()
