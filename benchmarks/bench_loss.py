"""How fast is the loss with its gradient, beside plain PyTorch, torch.compile and a copy of the logits?

    python -m benchmarks.bench_loss               # the table, all candidates in turn in one run
    pytest benchmarks/bench_loss.py -o python_files="bench_*.py"

Traffic is counted in NVe: one pass over the logits, N x V x element size. Two are the lower bound (read the logits,
write the gradient), and what a copy moves; the rate is 2 NVe / time for every candidate, whatever it moves.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.timing import interleaved, machine
from repo_kernels import repo_loss

ROWS, VOCABULARY = 1024, 50_257
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits (N, V), ids, old log-probs and advantages (N,)."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
    ids = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    old = torch.log_softmax(logits.detach().float(), -1).gather(-1, ids[:, None])[:, 0]
    return logits, ids, old + 0.1 * torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)


def plain(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The same loss as most training scripts write it: log_softmax, gather, autograd."""
    logps = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]
    delta = logps - old
    ratio = delta.exp()
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return (surrogate + 0.02 * ratio * ((-delta).exp() + delta - 1)).mean()


def fused(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor, inplace: bool = False) -> Tensor:
    """repo_loss on the backend of the device."""
    return repo_loss(logits, ids, old, advantages, ref_logps=old, beta=0.02, inplace=inplace).loss


def gradient(loss: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward of one call; the gradient of the logits."""
    return torch.autograd.grad(loss(*arguments), arguments[0])[0]


def candidates(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What is timed, each checked against the first for equal results."""
    arguments = inputs(dtype)
    logits = arguments[0]
    compiled = torch.compile(plain)
    ways: dict[str, Callable[..., Tensor]] = {"torch eager": plain, "torch.compile": compiled, "repo_loss": fused}
    expected = gradient(plain, arguments).float()
    for name, way in ways.items():
        error = ((gradient(way, arguments).float() - expected).norm() / expected.norm()).item()
        assert error < (1e-4 if dtype == torch.float32 else 1e-2), f"{name} differs from torch eager by {error:.1e}"
    dead = torch.full_like(arguments[1], -100)
    scratch = torch.empty_like(logits)
    again = logits.detach().clone()

    def in_place() -> None:
        # each call takes the gradient of the one before for logits: other numbers, the same work
        gradient(functools.partial(fused, inplace=True), (again.detach().requires_grad_(), *arguments[1:]))

    return {
        **{name: (lambda way=way: gradient(way, arguments)) for name, way in ways.items()},
        "repo_loss in place": in_place,
        "repo_loss, all rows masked": lambda: gradient(fused, (logits, dead, *arguments[2:])),
        "copy of the logits": lambda: scratch.copy_(logits.detach()),
    }


def table(dtype: torch.dtype, rounds: int) -> str:
    """Markdown: median, spread, rate at 2 NVe, ratios to the baselines."""
    times = interleaved(candidates(dtype), rounds)
    eager, compiled = times["torch eager"].median, times["torch.compile"].median
    copy, moved = times["copy of the logits"].median, 2 * ROWS * VOCABULARY * dtype.itemsize
    lines = [
        f"N = {ROWS}, V = {VOCABULARY}, {str(dtype).removeprefix('torch.')}; 2 NVe = {moved / 1e6:.0f} MB",
        "",
        "| | median ms [quartiles] | GB/s at 2 NVe | of the copy | eager / this | compile / this |",
        "|---|---|---|---|---|---|",
    ]
    for name, time in times.items():
        lines.append(
            f"| {name} | {1e3 * time.median:.1f} [{1e3 * time.low:.1f}, {1e3 * time.high:.1f}] "
            f"| {moved / time.median / 1e9:.1f} | {copy / time.median:.0%} "
            f"| {eager / time.median:.2f} | {compiled / time.median:.2f} |"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [plain, fused])
def test_loss_and_gradient(benchmark, way: Callable[..., Tensor], dtype: str) -> None:
    """Forward and backward of one call."""
    arguments = inputs(DTYPES[dtype])
    benchmark(gradient, way, arguments)
    size = 2 * arguments[0].numel() * arguments[0].element_size()
    benchmark.extra_info["GB/s at 2 NVe"] = round(size / benchmark.stats["median"] / 1e9, 2)


def main() -> None:
    """Print the table for the types asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="types of the logits")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each candidate")
    options = parser.parse_args()
    print(f"{machine()}, {options.rounds} rounds\n")
    for dtype in options.dtype:
        print(table(DTYPES[dtype], options.rounds), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
