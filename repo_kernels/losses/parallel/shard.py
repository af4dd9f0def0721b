"""VocabularyShard: which rows of the head a process holds, and the sums over all of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ...backends.codes import IGNORED
from ...tensor_kinds import has_values, is_traced, is_transformed
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
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        return VocabularyShard(group, rank * rows, rows, size * rows, even=True)

    @staticmethod
    def of_dim(group: dist.ProcessGroup, total: int) -> VocabularyShard:
        """Return the shard of this process as `Shard(0)` of a DTensor cuts V: ceil(V / P) rows, the last ones fewer.

        Raises:
            ValueError: in every process, if one of them has no row.
        """
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        step = -(-total // size)
        if (size - 1) * step >= total:
            raise ValueError(f"weight must have a row for every process; got {total} rows, {step} each for {size}")
        return VocabularyShard(group, rank * step, min(step, total - rank * step), total)

    def local_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids (N,) within the shard, and which are in it, (N,) bool.

        Live ids of other shards become `rows`, one past the last one. Ignored ids stay.

        Raises:
            IndexError: a live id is outside [0, V); looked at on the CPU alone, where that does not wait.
        """
        live = ids != IGNORED
        if ids.device.type == "cpu" and has_values(ids):
            wrong = ids[live & ((ids < 0) | (ids >= self.total))]
            if wrong.numel():
                raise IndexError(f"token_ids must lie in [0, {self.total}); got {wrong[0].item()}")
        owned = live & (ids >= self.start) & (ids < self.start + self.rows)
        return torch.where(owned, ids - self.start, torch.where(live, self.rows, IGNORED)), owned

    def maximum(self, values: Tensor) -> Tensor:
        """Return the largest of the processes' values (N,), elementwise.

        Raises:
            ValueError: in every process, if they have unequal shards though `even`; looked at where `local_ids` looks.
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

    def total_of(self, values: Tensor) -> Tensor:
        """Return the sum of the processes' values, elementwise."""
        values = values.contiguous().clone()
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
    if group is not None:
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
    """Check that it is a process group or None."""
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group or None; got {type(group).__name__}")


def _dtensor() -> type | None:
    """Return DTensor where a program has loaded it, else None: there can be none then."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def _is_cut_by_rows(value: Any) -> bool:
    return value.device_mesh.ndim == 1 and len(value.placements) == 1 and value.placements[0].is_shard(0)


def check_sharded(softcap: float | None) -> None:
    """Check what a divided vocabulary does not take yet: a softcap, and a call that is traced or transformed."""
    if softcap:
        raise ValueError(f"softcap must be None where the vocabulary is divided among processes; got {softcap!r}")
    if is_traced() or is_transformed():
        raise RuntimeError(
            "a vocabulary that is divided among processes cannot be traced by torch.compile nor transformed by "
            "torch.func: the call waits for the other processes"
        )
