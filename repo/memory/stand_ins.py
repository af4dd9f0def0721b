"""Stand-ins: allocate and save what kernels of a device would, for tensors on "meta", where those kernels do not run.

Everything else of a forward and backward pass is the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from repo_kernels.losses.heads.chunks import Budget, HeadSizes
from repo_kernels.losses.heads.gemm import BLOCK_ROWS, allocates

from ..data.segments import take_rows
from .live_bytes import LiveBytes, size_of

IMPLEMENTATION = "repo_sizes"
PRODUCTS = {
    nn.functional.linear,
    torch.matmul,
    torch.bmm,
    torch.mm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.bmm,
    torch.addmm,
    Tensor.addmm,
    torch.baddbmm,
    Tensor.baddbmm,
    nn.functional.conv1d,
}
"""Functions that autocast runs in half precision, as far as decoder layers call them."""


@dataclass(frozen=True)
class AttentionKernel:
    """What a kernel of causal attention keeps.

    half: dtype that queries, keys and values are cast to, None for that of the values.
    repeats: grouped heads are repeated before the kernel. joins: outputs of several calls are copied into one tensor.
    sums: its backward adds up dL/dq in fp32 memory of its own.
    """

    half: torch.dtype | None
    repeats: bool = False
    joins: bool = False
    sums: bool = False


@dataclass
class Pattern:
    """What `sized_attention` reads and writes, inside `sized`.

    keys: (K,) index of each key's token; None where segments attend to their own tokens alone.
    saved: bytes that attention has saved for the backward pass so far.
    """

    keys: Tensor | None
    kernel: AttentionKernel
    saved: int = 0


_pattern: ContextVar[Pattern] = ContextVar("pattern")


def sized_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    """Allocate what packed attention does; arguments and result as of the function for packed rows."""
    pattern = _pattern.get()
    kernel = pattern.kernel
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(kernel.half or value.dtype) for x in (query, key, value))
    if pattern.keys is not None:
        k, v = take_rows(k, pattern.keys), take_rows(v, pattern.keys)
    if kernel.repeats and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = _Attention.apply(q, k, v, kernel)
    pattern.saved += size_of(q, k, v, out) + 4 * q.shape[0] * q.shape[1]
    out = torch.cat([out]) if kernel.joins else out
    return out.unflatten(0, (query.shape[0], -1)), None


AttentionInterface.register(IMPLEMENTATION, sized_attention)


class _Attention(torch.autograd.Function):
    """Saves queries, keys, values, the output and a sum per query and head, as all kernels without a T x T matrix do.

    q: (T, Hq, D). k, v: (K, Hk, D). The output is (T, Hq, Dv).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel) -> Tensor:
        out = v.new_empty(*q.shape[:2], v.shape[2])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
        ctx.kernel = kernel
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        held = q.new_empty(q.shape, dtype=torch.float32) if ctx.kernel.sums else None
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        del held
        if ctx.kernel.joins:  # those of the calls are copied into one tensor, of q, of k and of v in turn
            for i, gradient in enumerate(gradients):
                gradients[i] = torch.empty_like(gradient)
        return *gradients, None


class Head(torch.autograd.Function):
    """Allocates what the losses from hidden states do: the gradients in the forward pass, with a chunk of logits."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, budget: Budget, sizes: HeadSizes, live: LiveBytes) -> Tensor:
        """hidden: (N, H). weight: (V, H), on "meta" as everything else. budget, sizes: of the chunks of logits."""
        totals = [hidden.new_empty(hidden.shape, dtype=sizes.result)]
        if sizes.with_weight:
            totals.append(weight.new_empty(weight.shape, dtype=sizes.result))
        cast = 0 if weight.dtype == sizes.factors else weight.numel() * sizes.factors.itemsize
        rows = budget.rows(len(hidden), sizes)
        if sizes.with_weight and allocates(torch.device(budget.device), sizes.factors):  # copies a block of both
            cast += min(BLOCK_ROWS, sizes.vocabulary) * (rows + sizes.width) * sizes.factors.itemsize
        live.inside(cast + rows * sizes.row_bytes)
        ctx.save_for_backward(*totals)
        ctx.dtypes = hidden.dtype, weight.dtype
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        totals = [total.to(dtype) for total, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=False)]
        return *totals, *(None,) * (5 - len(totals))


def grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Allocate the product of groups of rows by a matrix each, which PyTorch knows on "meta" in bf16 alone.

    a: (rows, k) or (groups, m, k). b: (groups, k, n), or (k, n) whose columns or rows fall into groups.
    offs: (groups,) ends of the groups.
    """
    if a.ndim == 2 and b.ndim == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    rows = a.shape[:-1] if b.ndim == 3 else a.shape[1:2]
    return a.new_empty(*rows, b.shape[-1])


KERNELS = {"aten::_grouped_mm": grouped_product}
"""Stand-ins of operators, by name."""


class Autocast(TorchFunctionMode):
    """Does what torch.autocast does, which knows no "meta": products in half precision, trained weights cast once.

    copies: the casts, by the id of their weight; None casts weights anew each time, as in a backward pass.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.copies: dict[int, Tensor] | None = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function, a product on tensors that are cast."""
        if func in PRODUCTS:
            args = tuple(map(self._cast, args))
            kwargs = {name: self._cast(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return a forward that runs in this mode, in a recomputation too, which PyTorch calls without its modes."""

        def cast(*args: Any, **kwargs: Any) -> Any:
            with self:
                return forward(*args, **kwargs)

        return cast

    def release(self) -> int:
        """Forget the casts, as autocast does at its end; returns their bytes."""
        size, self.copies = sum(copy.nbytes for copy in (self.copies or {}).values()), None
        return size

    def _cast(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self.copies is None or not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(self.dtype)
        return self.copies[id(value)]


@contextmanager
def sized(trunk: Any, pattern: Pattern) -> Iterator[None]:
    """Context in which the layers of a trunk attend by `sized_attention`."""
    configs = [trunk.config, trunk.config.get_text_config()]
    before, token = [config._attn_implementation for config in configs], _pattern.set(pattern)
    try:
        for config in configs:
            config._attn_implementation_internal = IMPLEMENTATION
        yield
    finally:
        _pattern.reset(token)
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
