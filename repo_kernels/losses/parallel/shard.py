"""VocabularyShard: which rows of the head a process holds, and the sums over all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...backends.codes import IGNORED
from ...tensor_kinds import is_transformed
from ..heads.lora import LoraHead


@dataclass(frozen=True)
class VocabularyShard:
    """The rows start to start + rows of a vocabulary of `total` tokens; every process of the group has a shard.

    Args:
        group: the processes.
        start, rows: of this process.
        total: V, over all processes.
        even: every process must have as many rows.
    """

    group: dist.ProcessGroup
    start: int
    rows: int
    total: int
    even: bool = False

    @staticmethod
    def equal(group: dist.ProcessGroup, rows: int) -> VocabularyShard:
        """Return the shard of this process where every process has as many rows, in the order of its rank."""
        return VocabularyShard(group, group.rank() * rows, rows, group.size() * rows, even=True)

    @staticmethod
    def of_dim(group: dist.ProcessGroup, total: int) -> VocabularyShard:
        """Return the shard of this process as `Shard(0)` of a DTensor cuts V: ceil(V / P) rows, the last ones fewer.

        Raises:
            ValueError: in every process, if one of them has no row.
        """
        size, rank = group.size(), group.rank()
        step = -(-total // size)
        if (size - 1) * step >= total:
            raise ValueError(f"weight must have a row for every process; got {total} rows, {step} each for {size}")
        return VocabularyShard(group, rank * step, min(step, total - rank * step), total)

    @staticmethod
    def of(name: str, numbers: Sequence[int]) -> VocabularyShard:
        """Return the shard that an operator was given as `name` and `numbers`."""
        start, rows, total, even = numbers
        group = dist.distributed_c10d._resolve_process_group(cast(Any, name))
        return VocabularyShard(group, start, rows, total, bool(even))

    @property
    def name(self) -> str:
        """The name of the group, by which an operator finds it."""
        return self.group.group_name

    @property
    def numbers(self) -> list[int]:
        """start, rows, total and even."""
        return [self.start, self.rows, self.total, int(self.even)]

    @property
    def processes(self) -> int:
        """P."""
        return self.group.size()

    def check_ids(self, ids: Tensor) -> None:
        """Raise IndexError if a live id is outside [0, V); looked at on the CPU alone, where that does not wait."""
        if ids.device.type == "cpu":
            wrong = ids[(ids != IGNORED) & self._outside(ids)]
            if wrong.numel():
                raise IndexError(f"token_ids must lie in [0, {self.total}); got {wrong[0].item()}")

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids (N,) within the shard, and which are in it, (N,) bool.

        Live ids of other shards become `rows`, one past the last one. Ignored ids stay. An id outside [0, V) becomes
        -1 and counts as in every shard, so that the NaN that Triton gives it arrives in the sums.
        """
        live, outside = ids != IGNORED, self._outside(ids)
        owned = live & (ids >= self.start) & (ids < self.start + self.rows)
        local = torch.where(owned, ids - self.start, torch.where(live, self.rows, IGNORED))
        return torch.where(live & outside, -1, local), owned | (live & outside)

    def _outside(self, ids: Tensor) -> Tensor:
        return (ids < 0) | (ids >= self.total)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the largest of the processes' values (N,), elementwise.

        Raises:
            ValueError: in every process, if they have unequal shards though `even`; looked at where `check_ids` looks.
        """
        sizes = [values.new_full((1,), rows) for rows in (self.rows, -self.rows)]  # travel along
        largest = torch.cat((values, *sizes))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        if self.even and values.device.type == "cpu" and largest[-2] != -largest[-1]:
            raise ValueError(
                f"group needs as many rows of the vocabulary in every process; got {-largest[-1]:.0f} to "
                f"{largest[-2]:.0f}: pass a DTensor weight that is sharded on dim 0"
            )
        return largest[:-2]

    def add_up(self, values: Tensor) -> Tensor:
        """Replace the processes' values by their sum, elementwise, and return it."""
        dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values


def local_head(
    weight: Tensor | LoraHead, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor | LoraHead, Tensor | None, VocabularyShard | None]:
    """Return the rows of the head that this process holds, and its shard; None if the head is whole.

    Args:
        weight: (V, H) whole, (V / P, H) with a group, or a DTensor of (V, H) that is sharded on dim 0 of a mesh of one
            dimension; or a LoraHead whose base and lora_B are (V, ...) whole or (V / P, ...) with a group.
        bias: likewise (V,), or None. group: the processes that hold equally many rows each, or None.

    Raises:
        TypeError, ValueError: group is no process group, or not with a DTensor, or the DTensor is cut otherwise.
    """
    check_group(group)
    kind = _dtensor()
    if kind is None or not isinstance(weight, kind):
        if kind is not None and isinstance(bias, kind):
            raise ValueError("bias must be a plain tensor with a plain weight; got a DTensor")
        rows = weight.base if isinstance(weight, LoraHead) else weight
        shard = None if group is None or not isinstance(rows, Tensor) else VocabularyShard.equal(group, len(rows))
        return weight, bias, shard
    if group is not None:
        raise ValueError("group must be None with a DTensor weight, whose mesh says which processes share it")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not (isinstance(value, kind) and _is_cut_by_rows(value)):
            raise ValueError(
                f"{name} must be a DTensor with placements (Shard(dim=0),) on a mesh of one dimension; got "
                f"{getattr(value, 'placements', 'a plain tensor')}"
            )
    cut: Any = weight
    shard = VocabularyShard.of_dim(cut.device_mesh.get_group(), cut.shape[0])
    return cut.to_local(), None if bias is None else cast(Any, bias).to_local(), shard


def check_group(group: object) -> None:
    """Check that it is a process group with this process in it, or None."""
    if group is None or isinstance(group, dist.ProcessGroup):
        return
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group must have this process in it; got NON_GROUP_MEMBER, which new_group returns to the processes that "
            "it leaves out: they have no part of the vocabulary and make no call"
        )
    raise TypeError(f"group must be a torch.distributed process group or None; got {type(group).__name__}")


def _dtensor() -> type | None:
    """Return DTensor where a program has loaded it, else None: there can be none then."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def _is_cut_by_rows(value: Any) -> bool:
    return value.device_mesh.ndim == 1 and len(value.placements) == 1 and value.placements[0].is_shard(0)


def check_divided() -> None:
    """Raise RuntimeError in a transform, which would have to run the collectives."""
    if is_transformed():
        raise RuntimeError(
            "a vocabulary that is divided among processes cannot be transformed by torch.func nor differentiated in "
            "forward mode: the call waits for the other processes; use backward, or a whole vocabulary"
        )
