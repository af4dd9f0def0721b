"""World: the processes that train together, and what they tell each other. A run of one process is a world of one.

Every process holds the same rollout batch, computes the same advantages, lambda and metrics from it, and takes its own
share of the sampling and of every minibatch. So no result depends on their number but by rounding.
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
BUCKET = 2**25  # elements that are added over processes in one call
LETTING_GO = 0.1  # seconds; gloo's threads need microseconds


@dataclass(frozen=True)
class World:
    """rank: this process, of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def slice(self, count: int) -> range:
        """This process's part of `count` items, adjacent ones; sizes differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank. Values are pickled, among processes of one run."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def any(self, value: bool) -> bool:
        """Whether it is true of any process."""
        return any(self.gather(value))

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, for all. Where it fails, the others end without a word."""
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
        """Wait for all."""
        self.gather(None)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes; the same bits on each."""
        return torch.stack(self.gather(tensor)).sum(0) if self.size > 1 else tensor

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add the gradients of parameters that every process has whole.

        PyTorch's DDP would do it during the backward pass, in buckets that it rearranges after the first one: a run
        that goes on from a checkpoint would add in another order. Here buckets are the same at every step, and one sum
        serves all micro-batches of a minibatch.
        """
        if self.size == 1:
            return
        used = [any(has) for has in zip(*self.gather([p.grad is not None for p in parameters]), strict=True)]
        gradients = []
        for parameter, is_used in zip(parameters, used, strict=True):
            if is_used and parameter.grad is None:  # an expert, say, that no token of this process met
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


def _add(gradients: list[Tensor]) -> None:
    if not gradients:
        return
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


@contextmanager
def joined(device_of: Callable[[], torch.device]) -> Iterator[World]:
    """The world that torchrun has set up, or a world of one. Lost processes end this one with a sentence."""
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
            raise UserError(f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot find each other: {first_line(error)}") from error
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
        # A gloo thread lets go of a collective's tensors after the collective is done, and needs the interpreter for
        # it. One that comes when the interpreter is ending aborts the process (CPython < 3.14, which ends such threads
        # by unwinding them; pytorch#179291). Destroying the group joins the threads only where nothing else holds it,
        # and DTensor's caches do. Asleep, this thread leaves them the interpreter.
        time.sleep(LETTING_GO)


def _from_environment(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdigit():
        raise UserError(f"${name} must be a number, as torchrun sets it; got {value!r}")
    return int(value)
