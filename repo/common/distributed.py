"""World: the processes that train together, and the exchanges between them. A run of one process is a world of one.

Every process holds the same rollout batch and computes the same advantages, lambda and metrics from it. Sampling and
the rows of each minibatch are divided among the processes. The number of processes therefore changes results by
rounding only.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError, first_line

T = TypeVar("T")
LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote process exited", re.IGNORECASE)
BUCKET = 2**25  # gradient elements that one all-reduce adds
LETTING_GO = 0.1  # seconds to wait for gloo's threads at the end; they need microseconds


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    rank: number of this process, from 0. size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Tell whether this is process 0, the one that writes files and prints."""
        return self.rank == 0

    def slice(self, count: int) -> range:
        """Return the indices of this process's part of `count` items.

        The parts are contiguous and in order of rank; their sizes differ by at most one.
        """
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, in order of rank. Values are pickled. Every process calls it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, value: bool) -> bool:
        """Tell whether `value` is true on any process. Every process calls it."""
        return any(self.gather(value))

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` on the first process and return its result on all. Every process calls it.

        If `make` raises, the first process raises, and the others exit with code 2 and print nothing.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [None]
        if self.first:
            try:
                box = [(make(), True)]
            except BaseException:
                dist.broadcast_object_list([(None, False)])
                raise
        dist.broadcast_object_list(box)
        value, made = box[0]
        if not made:
            sys.exit(2)
        return value

    def barrier(self) -> None:
        """Wait until every process has called this."""
        self.gather(None)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor over processes, which all get the same bits. Every process gives the same shape and dtype."""
        return torch.stack(self.gather(tensor)).sum(0) if self.size > 1 else tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of unsharded parameters over processes, in place. Every process calls it.

        A parameter that has a gradient on some processes counts as zero on the others. DDP is not used because it
        rearranges its buckets after the first backward pass, so a resumed run would add in another order. Here the
        buckets are the same at every step, and one sum serves all micro-batches of a minibatch.
        """
        if self.size == 1:
            return
        used = [any(has) for has in zip(*self.gather([p.grad is not None for p in parameters]), strict=True)]
        gradients = []
        for parameter, is_used in zip(parameters, used, strict=True):
            if is_used and parameter.grad is None:  # for example an expert that got no token on this process
                parameter.grad = torch.zeros_like(parameter)
            gradients += [parameter.grad] if parameter.grad is not None else []
        bucket: list[Tensor] = []
        room = BUCKET
        for gradient in gradients:
            if bucket and gradient.numel() > room:
                _add(bucket)
                bucket, room = [], BUCKET
            bucket.append(gradient)
            room -= gradient.numel()
        _add(bucket)


ALONE = World()
"""The world of a run of one process."""


def _add(gradients: list[Tensor]) -> None:
    """Add one bucket of gradients over processes, in place, by a single all-reduce."""
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


@contextmanager
def joined(device_of: Callable[[], torch.device]) -> Iterator[World]:
    """Join the process group that torchrun has set up, and yield it as a World; without torchrun a world of one.

    device_of: called if there are several processes; returns the device that model.device names.

    Raises:
        UserError: torchrun's environment variables are missing or wrong, this process has no GPU, the processes cannot
        connect, or another process ends while the body runs.
    """
    size = _from_environment("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"$WORLD_SIZE is {size} but ${missing[0]} is not set; start several processes with torchrun")
    device, local = device_of(), _from_environment("LOCAL_RANK", 0)
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(
                f"model.device must be cuda with several processes, each of which has its own; got {device}"
            )
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU: it needs GPU {local}, and there are "
                f"{torch.cuda.device_count()} GPUs"
            )
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot connect to each other: {first_line(error)}") from error
    world = World(dist.get_rank(), size)
    try:
        yield world
    except RuntimeError as error:  # gloo and NCCL raise no type of their own
        if not LOST.search(str(error)):
            raise
        raise UserError(f"process {world.rank}: another process of the run has ended; its message says why") from error
    else:
        dist.destroy_process_group()
    finally:
        # Gloo's threads release a collective's tensors after the collective has ended, and take the interpreter lock
        # to do so. A thread that asks for the lock while the interpreter shuts down aborts the process (CPython < 3.14
        # unwinds such threads; pytorch#179291). destroy_process_group joins the threads only if nothing else refers to
        # the group, and DTensor's caches do. Sleeping here leaves the lock to them.
        time.sleep(LETTING_GO)


def _from_environment(name: str, default: int) -> int:
    """Read a whole number from an environment variable. Raises UserError if it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise UserError(f"${name} must be a number, as torchrun sets it; got {value!r}")
    return int(value)
