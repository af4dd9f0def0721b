"""What does each process hold and wait for when the vocabulary is divided among P processes with gloo?

    python -m benchmarks.divided_vocabulary                 # P = 1, 2, 4; --tokens, --vocabulary, --rounds

One call of linear_repo_loss and its backward, fp32, one thread a process. Memory is what the call adds at its peak, the
largest of the processes, without the head itself; "whole" is the loss without a group. Predicted: dL/dweight and the
padded copy of the head fall as 1 / P; a chunk of logits and dL/dhidden stay. With more processes than cores the time
says nothing but the work: the logits are formed twice, which makes the four GEMMs of P = 1 a third more than the three
of the whole head.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.harness.memory import extra_peak
from repo_kernels import linear_repo_loss

HIDDEN = 576


def run(rank: int, processes: int, tokens: int, vocabulary: int, rounds: int, folder: str) -> None:
    """Measure in process `rank`; process 0 writes (bytes, seconds) of a group and, where P = 1, of the whole head."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", processes), rank=rank, world_size=processes)
    torch.manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(vocabulary // processes, HIDDEN).requires_grad_()
    ids = torch.randint(0, vocabulary, (tokens,))
    old, advantages = torch.full((tokens,), -10.0), torch.randn(tokens)

    def call(group: dist.ProcessGroup | None) -> None:
        hidden.grad = weight.grad = None
        linear_repo_loss(hidden, weight, ids, old, advantages, group=group).loss.backward()

    lines = []
    for name, group in (("divided", dist.group.WORLD), *((("whole", None),) if processes == 1 else ())):
        call(group)
        hidden.grad = weight.grad = None
        added, seconds = torch.tensor(float(extra_peak(lambda group=group: call(group)))), []
        dist.all_reduce(added, dist.ReduceOp.MAX)
        for _ in range(rounds):
            dist.barrier()
            start = time.perf_counter()
            call(group)
            seconds.append(time.perf_counter() - start)
        lines.append(f"P = {processes}, {name}: {added.item() / 1e6:7.1f} MB, {statistics.median(seconds):.3f} s")
    if rank == 0:
        Path(folder, "lines").write_text("\n".join(lines))
    dist.destroy_process_group()


def main() -> None:
    """Measure every P and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls, of which the median is printed")
    options = parser.parse_args()
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (processes, options.tokens, options.vocabulary, options.rounds, folder)
            mp.spawn(run, arguments, nprocs=processes)
            print(Path(folder, "lines").read_text(), flush=True)


if __name__ == "__main__":
    main()
