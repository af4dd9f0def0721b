"""A model of a GPU's L2 cache: replays what a kernel does to one row over many rows, and counts the bytes of DRAM.

Fully associative, in segments of 2 KB (16 lines of 128 bytes; smaller ones would only be slower, as the kernels here
move whole blocks). A load that misses reads its segment from DRAM. A store allocates without reading, since whole
sectors are written, and its segment is written back when it is evicted or at the end. Replacement is least recently
used within a priority: segments last touched with `evict_first` leave first, those with `evict_last` last; or strictly
least recently used. `resident` programs run at a time, each making one access in turn; a finished one is replaced by
the next. Everything this returns is *modelled*.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SEGMENT = 2048
MEGABYTE = 2**20
PRIORITY = {"evict_first": 0, "evict_normal": 1, "evict_last": 2}


class Access(NamedTuple):
    """One run of consecutive bytes that a program loads or stores at once, from the start of its row."""

    tensor: str
    store: bool
    start: int
    size: int
    hint: str = "evict_normal"


# The accesses of each program of one launch that touches the row, in launch order.
RowPrograms = Sequence[Sequence[Access]]


class L2:
    """The cache. `read` and `written`: bytes exchanged with DRAM so far."""

    def __init__(self, capacity: int, hints: bool = True) -> None:
        self.capacity, self.hints = capacity, hints
        self.used = self.read = self.written = 0
        # Segment -> (bytes, dirty), least recently used first, by priority; and the priority of each segment.
        self._levels: list[OrderedDict[int, tuple[int, bool]]] = [OrderedDict() for _ in PRIORITY]
        self._level_of: dict[int, int] = {}

    def touch(self, segment: int, size: int, store: bool, priority: int) -> None:
        """Load or store `size` bytes, the whole of a segment."""
        priority = priority if self.hints else 1
        level = self._level_of.get(segment)
        if level is None:
            while self.used + size > self.capacity and self._level_of:
                self._evict()
            self.used += size
            self.read += 0 if store else size
            dirty = store
        else:
            dirty = self._levels[level].pop(segment)[1] or store
        self._levels[priority][segment] = size, dirty
        self._level_of[segment] = priority

    def _evict(self) -> None:
        segment, (size, dirty) = next(level for level in self._levels if level).popitem(last=False)
        del self._level_of[segment]
        self.used -= size
        self.written += size if dirty else 0

    def flush(self) -> None:
        """Write back all that is dirty."""
        while self._level_of:
            self._evict()


@dataclass(frozen=True)
class DramTraffic:
    """Passes over the logits from and to DRAM, *modelled*. One pass is rows x row bytes."""

    read: float
    written: float

    @property
    def total(self) -> float:
        """Both directions."""
        return self.read + self.written


def _segments(accesses: Iterable[Access], tensors: list[str], row_bytes: int) -> list[list[tuple[int, int, bool, int]]]:
    """(segment in row 0, bytes, store, priority) of each access. Rows are laid out so that each starts a segment."""
    per_tensor = -(-row_bytes // SEGMENT)
    found = []
    for access in accesses:
        first, last = access.start // SEGMENT, (access.start + access.size - 1) // SEGMENT
        base = tensors.index(access.tensor) * per_tensor
        found.append(
            [
                (base + i, min(SEGMENT, row_bytes - i * SEGMENT), access.store, PRIORITY[access.hint])
                for i in range(first, last + 1)
            ]
        )
    return found


def replay(
    launches: Sequence[RowPrograms],
    row_bytes: int,
    rows: int = 396,
    resident: int = 132,
    capacity: int = 50 * MEGABYTE,
    hints: bool = True,
) -> DramTraffic:
    """Run every launch over all rows, one after the other, through one cache.

    launches: of each launch, the programs of one row. Program k of every row starts before program k + 1 of any, the
    order of a grid (rows, k). rows: enough waves of `resident` ones to leave the start and the end behind.
    """
    tensors = sorted({access.tensor for launch in launches for program in launch for access in program})
    per_row = len(tensors) * -(-row_bytes // SEGMENT)
    cache = L2(capacity, hints)
    for launch in launches:
        programs = [_segments(program, tensors, row_bytes) for program in launch]
        waiting = iter([(row * per_row, program) for program in programs for row in range(rows)])
        running: deque[tuple[int, Iterator[list[tuple[int, int, bool, int]]]]] = deque()

        def start(running: deque = running, waiting: Iterator = waiting) -> None:
            if (following := next(waiting, None)) is not None:
                running.append((following[0], iter(following[1])))

        for _ in range(resident):
            start()
        while running:
            base, program = running.popleft()
            access = next(program, None)
            if access is None:
                start()
                continue
            for segment, size, store, priority in access:
                cache.touch(base + segment, size, store, priority)
            running.append((base, program))
    cache.flush()
    return DramTraffic(cache.read / (rows * row_bytes), cache.written / (rows * row_bytes))
