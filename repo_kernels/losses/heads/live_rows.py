"""LiveRows: the rows that a linear loss computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...backends.eager.kernels import take_rows
from ...backends.interface import RowRange


@dataclass(frozen=True)
class LiveRows:
    """The n of N rows whose id is not ignored.

    Args:
        total: N.
        count: n.
        index: (n,) int64, or None if all rows are live, so that nothing has to be gathered.
    """

    total: int
    count: int
    index: Tensor | None

    @staticmethod
    def of(alive: Tensor) -> LiveRows:
        """Find the rows where `alive` (N,) is True; the host waits for their number, which decides the chunks."""
        index = alive.nonzero().squeeze(1)
        total, count = alive.numel(), index.numel()
        return LiveRows(total, count, None if count == total else index)

    def range(self, start: int, stop: int) -> RowRange:
        """Return which rows the live rows from start to stop are."""
        return RowRange(start) if self.index is None else RowRange(index=self.index[start:stop])

    def take(self, columns: Tensor) -> Tensor:
        """Gather the live columns: (..., N) -> (..., n); what is 0-d, for all rows, stays as it is."""
        return columns if self.index is None or not columns.ndim else columns.index_select(-1, self.index)

    def take_hidden(self, hidden: Tensor) -> Tensor:
        """Gather the live rows: (T, H) or (B, L, H) -> (n, H)."""
        if self.index is None:
            return hidden.reshape(-1, hidden.shape[-1])
        return take_rows(hidden, self.index, hidden.dtype)

    def spread(self, columns: Tensor) -> Tensor:
        """Scatter live columns: (..., n) -> (..., N), 0 on dead rows."""
        if self.index is None:
            return columns
        return columns.new_zeros(*columns.shape[:-1], self.total).index_copy_(-1, self.index, columns)
