"""Budget: the memory that is free, and the largest micro-batch that fits into it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..common.errors import UserError
from ..config.schema import Config
from .description import GIB, Memory, memory_of
from .process import Process

STEP = 1024  # sizes that are tried: powers of two below it, then its multiples
MARGIN = 0.1  # share of the free memory that stays free: for what is not counted, and what the allocator rounds up
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Choice:
    """A size of micro-batches.

    tokens: the size. needs: bytes that the run will still take with it. free: bytes that are free.
    next: the next larger size, None if this one holds the whole batch. next_needs: bytes that it would take.
    """

    tokens: int
    needs: float
    free: float
    next: int | None
    next_needs: float

    def describe(self) -> str:
        """Describe the choice and its reason in one line."""
        limit = f"{self.free / GIB:.2f} GiB are free, of which {MARGIN:.0%} stay so"
        why = "holds the whole batch"
        if self.next is not None:
            why = f"{self.next} would need {self.next_needs / GIB:.2f}"
        return f"micro-batches: auto = {self.tokens} tokens, which need {self.needs / GIB:.2f} GiB ({limit}; {why})"


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on a device, for the CPU those of RAM. Raises UserError if they are not known."""
    if device.type == "cuda":
        # what PyTorch has reserved and does not use is free too
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    available = [size for size in (_free_ram(Path("/proc/meminfo")), _free_in_group(CGROUP)) if size is not None]
    if device.type != "cpu" or not available:
        raise UserError(f"optimizer.micro_batch_tokens: auto cannot see the free memory of {device}; give a number")
    return min(available)


def _free_ram(info: Path) -> int | None:
    """Read the available memory of Linux from its file meminfo."""
    if not info.is_file():
        return None
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def _free_in_group(folder: Path) -> int | None:
    """Read what the control group (version 2) of a container leaves; None if it has no limit."""
    limit, used = folder / "memory.max", folder / "memory.current"
    if not (limit.is_file() and used.is_file()) or limit.read_text().strip() == "max":
        return None
    statistics = folder / "memory.stat"
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    files = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return int(limit.read_text()) - int(used.read_text()) + files


def sizes(most: int) -> list[int]:
    """List the sizes to try in ascending order, up to the first that is not below `most` tokens."""
    listed = [128, 256, 512]
    while listed[-1] < most:
        listed.append(STEP * (listed[-1] // STEP + 1))
    return [size for i, size in enumerate(listed) if not i or listed[i - 1] < most]


def pick(process: Process, free: int, is_loaded: bool) -> Choice:
    """Pick the largest micro-batch whose peak fits into the free memory.

    free: bytes. is_loaded: the models are loaded, so that their weights are not free memory any more.

    Raises UserError if the smallest micro-batch does not fit, or if activations cannot be computed for this model.
    """
    tried: dict[int, float] = {}

    def needs(tokens: int) -> float:
        if tokens not in tried:
            memory = memory_of(process, tokens)
            if memory.activations is None:
                raise UserError(f"optimizer.micro_batch_tokens: auto cannot count {memory.uncounted[0]}; give a number")
            tried[tokens] = _still_needed(memory, is_loaded)
        return tried[tokens]

    listed, room = sizes(process.batch_tokens), free * (1 - MARGIN)
    low, high = 0, len(listed)  # listed[low - 1] fits, listed[high] does not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if needs(listed[middle]) <= room else (low, middle)
    if not low:
        raise UserError(
            f"optimizer.micro_batch_tokens: auto finds no size that fits: {listed[0]} tokens need "
            f"{needs(listed[0]) / GIB:.2f} GiB and {room / GIB:.2f} are to be had; use model.lora_rank, model.dtype "
            "bfloat16, model.gradient_checkpointing, or another device"
        )
    following = listed[low] if low < len(listed) else None
    return Choice(listed[low - 1], needs(listed[low - 1]), free, following, needs(following) if following else 0.0)


def _still_needed(memory: Memory, is_loaded: bool) -> float:
    """Return the bytes that a run takes beyond the models, or with them if they are not loaded yet."""
    return memory.peak - (sum(memory.loaded.values()) if is_loaded else 0)


def with_micro_batches(config: Config, tokens: int) -> Config:
    """Return the configuration with a number of tokens of a micro-batch."""
    return replace(config, optimizer=replace(config.optimizer, micro_batch_tokens=tokens))
