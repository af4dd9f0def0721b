"""What does each process hold and wait for when the vocabulary is divided among P processes with gloo?

    python -m benchmarks.divided_vocabulary                 # P = 1, 2, 4; --tokens, --vocabulary, --rounds

One call and its backward, fp32, one thread a process, of linear_repo_loss ("head") and of repo_loss ("logits"). Memory
is what the call adds at its peak, the largest of the processes, without hidden states, head and logits themselves;
"whole" is the loss without a group. Predicted: for the head a chunk of logits and dL/dweight, which fall as 1 / P, and
dL/dhidden, which stays; for the logits their gradient. With more processes than cores the time says nothing but the
work: the logits of a divided head are formed twice, which makes the four GEMMs of P = 1 a third more than the three of
the whole head.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.harness.memory import extra_peak
from repo_kernels import linear_repo_loss, repo_loss
from repo_kernels.losses.heads.chunks import Budget, HeadSizes

HIDDEN = 576


def predicted(form: str, processes: int, tokens: int, vocabulary: int) -> int:
    """Return the bytes that a call adds in each of the processes."""
    if form == "logits":
        return tokens * vocabulary // processes * 4
    sizes = HeadSizes(vocabulary // processes, HIDDEN, torch.float32, torch.float32)
    return sizes.peak_bytes(tokens, Budget("cpu", processes=processes).rows(tokens, sizes))


def calls(tokens: int, vocabulary: int, processes: int) -> dict[str, Callable[[dist.ProcessGroup | None], None]]:
    """Return a call with its backward for each form, which keeps the gradients until the next one."""
    torch.manual_seed(0)
    columns = vocabulary // processes
    hidden, weight = torch.randn(tokens, HIDDEN, requires_grad=True), torch.randn(columns, HIDDEN, requires_grad=True)
    logits = torch.randn(tokens, columns, requires_grad=True)
    ids = torch.randint(0, vocabulary, (tokens,))
    rest = ids, torch.full((tokens,), -10.0), torch.randn(tokens)

    def head(group: dist.ProcessGroup | None) -> None:
        hidden.grad = weight.grad = None
        linear_repo_loss(hidden, weight, *rest, group=group).loss.backward()

    def of_logits(group: dist.ProcessGroup | None) -> None:
        logits.grad = None
        repo_loss(logits, *rest, group=group).loss.backward()

    return {"head": head, "logits": of_logits}


def run(rank: int, processes: int, form: str, way: str, options: argparse.Namespace, folder: str) -> None:
    """Measure a form in process `rank`, "divided" or "whole"; process 0 writes a line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", processes), rank=rank, world_size=processes)
    group = None if way == "whole" else dist.group.WORLD
    calls(8, options.vocabulary, processes)[form](group)  # the products keep their work space from here on
    call, seconds = calls(options.tokens, options.vocabulary, processes)[form], []
    added = torch.tensor(float(extra_peak(lambda: call(group))))
    dist.all_reduce(added, dist.ReduceOp.MAX)
    for _ in range(options.rounds):
        dist.barrier()
        start = time.perf_counter()
        call(group)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        expected = predicted(form, processes, options.tokens, options.vocabulary)
        memory = f"{added.item() / 1e6:6.1f} MB, predicted {expected / 1e6:6.1f} MB"
        Path(folder, "line").write_text(
            f"P = {processes}, {form:6}, {way:7}: {memory}; {statistics.median(seconds):.3f} s"
        )
    dist.destroy_process_group()


def main() -> None:
    """Measure every P, in processes of their own for each form, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls, of which the median is printed")
    options = parser.parse_args()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"  # for the processes: what a tensor leaves is not kept in a heap
    for processes in options.processes:
        for form in ("head", "logits"):
            for way in ("divided", *(("whole",) if processes == 1 else ())):
                with tempfile.TemporaryDirectory() as folder:
                    mp.spawn(run, (processes, form, way, options, folder), nprocs=processes)
                    print(Path(folder, "line").read_text(), flush=True)


if __name__ == "__main__":
    main()
